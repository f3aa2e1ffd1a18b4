-- Members: the people who share an organisation's balance, each with a role and, if wanted, a limit for the month.
-- Keeps: no spend and no hold takes a member past the limit, no addition takes an account past its seats; what is used is
-- counted in 34_member_use.sql. Lock order: see 10_accounts.sql; members come last.

create or replace function credits.set_member(
  account_id    text,
  member_id     text,
  role          text    default 'member',
  monthly_limit numeric default null
)
returns credits.member_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id     text := credits._check_key(set_member.member_id, 'member_id', 200);
  v_role   text := coalesce(credits._check_word(set_member.role, 'role', '{owner,admin,member}'), 'member');
  v_limit  numeric;
  v_before credits.members;
begin
  if set_member.monthly_limit is not null then
    v_limit := credits._check_amount(set_member.monthly_limit, zero => true);
  end if;

  perform credits._lock_account(set_member.account_id);
  v_before := credits._member(set_member.account_id, v_id);
  if v_before.active is not true then
    perform credits._take_seat(set_member.account_id);
  end if;
  insert into credits.members as m (account_id, member_id, role, monthly_limit, created_at)
  values (set_member.account_id, v_id, v_role, v_limit, credits.now())
  on conflict on constraint members_pkey do update
    set role = excluded.role, monthly_limit = excluded.monthly_limit, active = true;
  if v_before.member_id is null then
    perform credits._begin_counting(set_member.account_id, v_id);
  end if;
  return credits._member_result(credits._member(set_member.account_id, v_id));
end $$;
comment on function credits.set_member(text, text, text, numeric) is
'Adds a member to an account, or changes one. States all of it: what is not given is the default again.

role is owner, admin or member; it is kept for the product and decides nothing here. monthly_limit is how many credits
spends and holds in the name of the member may take in a calendar month of the account''s time zone; null is no limit, 0
lets the member use none. What was used under the same member_id before, in this month, counts. Each active member takes
a seat of the account''s plan (plans.seats); calls that name a member_id which nobody has added need none, and have no
limit. The same call again changes nothing.
Errors: 400 invalid_request, 403 seat_limit_reached, 404 account_not_found, 422 invalid_amount.';

create or replace function credits.remove_member(
  account_id text,
  member_id  text
)
returns credits.member_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id text := credits._check_key(remove_member.member_id, 'member_id', 200);
begin
  perform credits._lock_account(remove_member.account_id);
  update credits.members m
     set active = false
   where m.account_id = remove_member.account_id and m.member_id = v_id;
  if not found then
    perform credits._fail(404, 'member_not_found', jsonb_build_object('member_id', v_id));
  end if;
  return credits._member_result(credits._member(remove_member.account_id, v_id));
end $$;
comment on function credits.remove_member(text, text) is
'Takes a member out of an account: the seat is free, and spend and reserve refuse the member_id from now on.

What the member has under way may still be settled. What was used this month is not forgotten if set_member adds the
member again. Removing twice changes nothing.
Errors: 400 invalid_request, 404 account_not_found, member_not_found.';

create or replace function credits.list_members(account_id text)
returns setof credits.member_result
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := credits.now();
begin
  perform credits._account(list_members.account_id);
  return query
    select r.*
      from credits._members_at(list_members.account_id, v_now) m,
           lateral credits._member_result(m) r
     where m.active
     order by m.created_at, m.member_id;
end $$;
comment on function credits.list_members(text) is
'The active members of an account, the first added first, with what each has used this month.

used is what was charged to the member and is held for the member, in credits, exactly: of spends and reservations made
in this calendar month of the account''s time zone. It may pass monthly_limit, since a settle above its hold is charged.
Errors: 400 invalid_request, 404 account_not_found.';

-- What spends and reservations ask -------------------------------------------------------------------------------------

-- Whether somebody has added the member. All others are free text.
create or replace function credits._is_listed(
  account_id text,
  member_id  text
)
returns boolean
language plpgsql
stable
as $$
begin
  perform from credits.members m where m.account_id = _is_listed.account_id and m.member_id = _is_listed.member_id;
  return found;
end $$;

-- Refuses who was removed, and what would pass the limit. Answers with the member; nulls for free text.
create or replace function credits._check_member(
  account_id text,
  member_id  text,
  amount     numeric,
  at         timestamptz
)
returns credits.members
language plpgsql
stable
as $$
declare
  v_member credits.members := credits._member(_check_member.account_id, _check_member.member_id, _check_member.at);
begin
  if not v_member.active then
    perform credits._fail(403, 'forbidden', jsonb_build_object('member_id', v_member.member_id),
      'The member was removed from the account; set_member adds it again.');
  elsif v_member.month_used + _check_member.amount > v_member.monthly_limit then
    perform credits._fail(429, 'member_limit_reached', jsonb_build_object('member_id', v_member.member_id,
        'limit', v_member.monthly_limit, 'used', v_member.month_used, 'required', trim_scale(_check_member.amount),
        'resets_at', credits._window_end('month', v_member.month_start, a.time_zone)),
      'Use less, wait for the next month, or raise the limit with set_member.')
       from credits.accounts a
      where a.account_id = _check_member.account_id;
  end if;
  return v_member;
end $$;

-- Helpers --------------------------------------------------------------------------------------------------------------

-- The members of an account as they are at a moment: in its month, and without the holds that have run out by then but
-- are not booked. Their row is of a later month if the clock was set back: then the entries are counted. Part of the plan of
-- whoever calls it, if the moment is a variable.
create or replace function credits._members_at(
  account_id text,
  at         timestamptz
)
returns setof credits.members
language sql
stable
as $$
  select m.account_id, m.member_id, m.role, m.monthly_limit, m.created_at, m.active, n.month_start,
         trim_scale(case when m.month_start = n.month_start then m.month_used
                         when m.month_start < n.month_start then 0
                         else (select c.month_used
                                 from credits._members_counted(m.account_id, _members_at.at, m.member_id) c) end
                    - case when b.next_due_at > _members_at.at then 0 else coalesce((
                        select sum(r.amount - r.captured)
                          from credits.reservations r
                         where r.account_id = m.account_id and r.member_id = m.member_id and r.status = 'open'
                           and r.expires_at between b.next_due_at and _members_at.at
                           and credits._window('month', r.created_at, a.time_zone) = n.month_start), 0) end)
    from credits.accounts a
    join credits.balances b on b.account_id = a.account_id
    join credits.members m on m.account_id = a.account_id,
         lateral (select credits._window('month', _members_at.at, a.time_zone) as month_start) n
   where a.account_id = _members_at.account_id
$$;

-- A row of nulls if nobody has added the member.
create or replace function credits._member(
  account_id text,
  member_id  text,
  at         timestamptz default credits.now()
)
returns credits.members
language plpgsql
stable
as $$
declare
  v_member credits.members;
begin
  select m.* into v_member
    from credits._members_at(_member.account_id, _member.at) m
   where m.member_id = _member.member_id;
  return v_member;
end $$;

create or replace function credits._member_result(member credits.members)
returns credits.member_result
language sql
immutable
as $$
  select row((_member_result.member).account_id, (_member_result.member).member_id, (_member_result.member).role,
             (_member_result.member).monthly_limit, (_member_result.member).month_used, (_member_result.member).active,
             (_member_result.member).created_at)::credits.member_result
$$;

-- One more active member, if the plan of the account has a seat left. The caller holds the lock.
create or replace function credits._take_seat(account_id text)
returns void
language plpgsql
as $$
declare
  v_plan  text := coalesce(credits._plan_at(credits._account(_take_seat.account_id), credits.now()),
                           (select p.code from credits.plans p where p.is_default));
  v_seats integer := (select p.seats from credits.plans p where p.code = v_plan);
  v_used  bigint := (select count(*) from credits.members m
                      where m.account_id = _take_seat.account_id and m.active);
begin
  if v_used >= v_seats then
    perform credits._fail(403, 'seat_limit_reached',
      jsonb_build_object('seats', v_seats, 'used', v_used, 'plan', v_plan),
      'Remove a member, or change to a plan with more seats.');
  end if;
  -- Written, not only locked: who began with an older snapshot (repeatable read) is not to go on without this member.
  update credits.balances b set entry_seq = b.entry_seq where b.account_id = _take_seat.account_id;
end $$;
