-- What members use: counted by whoever spends, reserves, refunds or closes a reservation, and counted anew from the entries.
-- Keeps: month_used is what was charged and is still held of what was made in the present month. The caller holds the lock
-- of the account; members come last in the lock order.

-- Counts an amount, which may be negative, in the month of a moment. Months that are over are not kept.
create or replace function credits._count_member(
  account_id text,
  member_id  text,
  amount     numeric,
  at         timestamptz
)
returns void
language plpgsql
as $$
begin
  update credits.members m
     set month_start = n.month_start,
         month_used  = trim_scale(case m.month_start when n.month_start then m.month_used else 0 end
                                  + _count_member.amount)
    from (select credits._window('month', _count_member.at, a.time_zone) as month_start
            from credits.accounts a
           where a.account_id = _count_member.account_id) n
   where m.account_id = _count_member.account_id and m.member_id = _count_member.member_id
     and m.month_start <= n.month_start;
end $$;

-- A counted reservation has closed: instead of what it held it counts what it charged, in the month of its reserve().
create or replace function credits._count_end(
  before credits.reservations,
  hold   credits.reservations
)
returns void
language plpgsql
as $$
begin
  perform credits._count_member((_count_end.hold).account_id, (_count_end.hold).member_id,
    coalesce((_count_end.hold).charged, 0)
      - case (_count_end.before).status when 'open' then (_count_end.before).amount - (_count_end.before).captured
                                        else 0 end,
    (_count_end.hold).created_at);
end $$;

-- A charge is given back, and counts as if it had been smaller.
create or replace function credits._count_refund(
  charge credits.entries,
  amount numeric
)
returns void
language plpgsql
as $$
declare
  v_made_at timestamptz;
begin
  if (_count_refund.charge).member_id is null then
    return;
  end if;
  select r.created_at into v_made_at
    from credits.reservations r
   where r.account_id = (_count_refund.charge).account_id and r.reservation_id = (_count_refund.charge).reservation_id;
  perform credits._count_member((_count_refund.charge).account_id, (_count_refund.charge).member_id,
    -_count_refund.amount, coalesce(v_made_at, (_count_refund.charge).created_at));
end $$;

-- A member is added: what the name has used and holds already, as free text, counts from now on.
create or replace function credits._begin_counting(
  account_id text,
  member_id  text
)
returns void
language plpgsql
as $$
begin
  update credits.reservations r
     set counted = true
    from credits.balances b
   where b.account_id = _begin_counting.account_id
     and r.account_id = b.account_id and r.member_id = _begin_counting.member_id
     and r.expires_at >= b.next_due_at and r.status = 'open';
  perform credits._count_anew(_begin_counting.account_id, _begin_counting.member_id);
end $$;

-- Counts the present month from the entries and open reservations, for one member or, in a new time zone, for all.
create or replace function credits._count_anew(
  account_id text,
  member_id  text default null
)
returns void
language plpgsql
as $$
declare
  v_now timestamptz := credits.now();
begin
  update credits.members m
     set month_start = c.month_start, month_used = c.month_used
    from credits._members_counted(_count_anew.account_id, v_now, _count_anew.member_id) c
   where m.account_id = c.account_id and m.member_id = c.member_id;
end $$;

-- Members as they should be in the month of a moment, by the entries and open reservations: one, those of an account, or
-- all. What is charged, held or given back belongs to the month in which the spend or the reserve was made. A hold that has
-- run out counts until that is booked. Where nobody knows the time zone there are no months. Part of the plan of whoever calls
-- it, if the moment is a variable.
create or replace function credits._members_counted(
  account_id text,
  at         timestamptz,
  member_id  text default null
)
returns setof credits.members
language sql
stable
as $$
  with months as materialized (
    select a.account_id, a.time_zone, n.month_start,
           credits._seq_at(a.account_id, n.month_start - interval '1 day') as last_seq
      from credits.accounts a,
           lateral (select credits._window('month', _members_counted.at, a.time_zone) as month_start) n
     where (_members_counted.account_id is null or a.account_id = _members_counted.account_id)
       and exists (select from credits.members m where m.account_id = a.account_id)
       and credits._is_zone(a.time_zone)
  ), uses as (
    select e.account_id, e.member_id, e.debt - e.amount as amount,
           coalesce(r.created_at, s.created_at, e.created_at) as made_at
      from months n
      join credits.entries e on e.account_id = n.account_id and e.entry_seq > n.last_seq
       and (_members_counted.member_id is null or e.member_id = _members_counted.member_id)
      left join credits.reservations r on r.account_id = e.account_id and r.reservation_id = e.reservation_id
      left join credits.entries s on s.account_id = e.account_id and s.entry_seq = e.refunds_seq
    union all
    select r.account_id, r.member_id, r.amount - r.captured, r.created_at
      from months n
      join credits.reservations r on r.account_id = n.account_id and r.status = 'open'
       and r.expires_at > n.month_start - interval '1 day'
       and (_members_counted.member_id is null or r.member_id = _members_counted.member_id)
  ), used as materialized (
    select u.account_id, u.member_id, sum(u.amount) as amount
      from uses u
      join months n on n.account_id = u.account_id
     where u.member_id is not null and credits._window('month', u.made_at, n.time_zone) = n.month_start
     group by u.account_id, u.member_id
  )
  select m.account_id, m.member_id, m.role, m.monthly_limit, m.created_at, m.active, n.month_start,
         trim_scale(coalesce(u.amount, 0))
    from months n
    join credits.members m on m.account_id = n.account_id
     and (_members_counted.member_id is null or m.member_id = _members_counted.member_id)
    left join used u on u.account_id = m.account_id and u.member_id = m.member_id
$$;
