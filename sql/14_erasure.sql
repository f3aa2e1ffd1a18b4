-- Erasure: what tells of a person goes, the books stay. What becomes of each column is a row (14_erasure_rules.sql); what Stripe
-- sent keeps the fields that the ledger is checked against, and nothing else. Keeps every invariant: audit() is empty afterwards.
-- Lock order: the account's balances row first, then the rest.

create or replace function credits.erase_account(
  account_id    text,
  release_holds boolean default false
)
returns credits.erase_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_result credits.erase_result;
begin
  perform credits._lock_account(erase_account.account_id);
  perform credits.release(r.account_id, r.reservation_id)
     from credits.reservations r
    where r.account_id = erase_account.account_id and r.status = 'open' and erase_account.release_holds;
  perform credits.remove_auto_topup(erase_account.account_id);  -- or it would buy what is forfeited
  perform credits._check_idle(erase_account.account_id);
  perform credits._end_internal(s, credits.now(), 'erase_account')
     from credits.subscriptions s
    where s.account_id = erase_account.account_id and s.source = 'internal' and s.state in ('active', 'canceling');
  perform credits._refresh_plan(erase_account.account_id);
  v_result.forfeited := credits._forfeit(erase_account.account_id);
  perform credits._close_account(erase_account.account_id);

  select x.* into v_result.objects, v_result.events, v_result.requests
    from credits._erase_stripe(erase_account.account_id) x;
  perform credits._erase_columns(erase_account.account_id);
  update credits.notification_deliveries d
     set last_error = null
    from credits.notifications n
   where n.account_id = erase_account.account_id and d.notification_id = n.notification_id;

  insert into credits.erasures as e (account_id, erased_at, last_at, forfeited)
  values (erase_account.account_id, credits.now(), credits.now(), v_result.forfeited)
  on conflict on constraint erasures_pkey do update
    set last_at = excluded.last_at, times = e.times + 1, forfeited = e.forfeited + excluded.forfeited
  returning e.account_id, e.erased_at, e.times, e.forfeited
    into v_result.account_id, v_result.erased_at, v_result.times, v_result.forfeited;
  return v_result;
end $$;
comment on function credits.erase_account(text, boolean) is
'Erases the personal data of an account for good, and closes it. The ledger stays, and stays sound.

Gone are e-mail, metadata, descriptions, subjects, members, notifications'' data, and what Stripe sent of its customer but for
ids, amounts, moments and states. The account_id, keys, reservation ids and Stripe''s ids stay: they are what the books and
their hashes refer to. What credits are left is taken back (forfeited). Its plan of our own ends. While reservations are open
(unless release_holds), a subscription of Stripe lives, a request to Stripe waits or a top-up is on its way it is refused. Safe
to repeat, which erases what came in since. Reads all stored events and objects of Stripe.
Errors: 400 invalid_request, 404 account_not_found, 409 account_in_use.';

create or replace function credits.erase_member(
  account_id    text,
  member_id     text,
  release_holds boolean default false
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id   text := credits._check_key(erase_member.member_id, 'member_id', 200);
  v_open bigint;
begin
  perform credits._lock_account(erase_member.account_id);
  perform credits.release(r.account_id, r.reservation_id)
     from credits.reservations r
    where r.account_id = erase_member.account_id and r.member_id = v_id and r.status = 'open' and erase_member.release_holds;
  select count(*) into v_open
    from credits.reservations r
   where r.account_id = erase_member.account_id and r.member_id = v_id and r.status = 'open';
  if v_open > 0 then
    perform credits._fail(409, 'account_in_use', jsonb_build_object('reservations', v_open),
      'Settle or release what the member has reserved (or release_holds => true).');
  end if;
  return credits._erase_columns(erase_member.account_id, v_id);
end $$;
comment on function credits.erase_member(text, text, boolean) is
'Erases one member of an account, and what tells of the person in what the member has used. Answers with how many rows did.

Gone are the member with its seat and limit, and of its entries, reservations and usages the member_id, description, subject,
metadata and arguments. Amounts, keys, hashes and all other members stay; get_usage counts the credits under no member. While the
member has open reservations (unless release_holds) it is refused. Safe to repeat, also for a member_id that set_member never saw.
Errors: 400 invalid_request, 404 account_not_found, 409 account_in_use.';

create or replace function credits.repeat_erasures()
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_repeated bigint;
begin
  select count(*) filter (where credits._erased_again(o.account_id)) into v_repeated
    from (select e.account_id
            from credits.erasures e
           where e.erased_at > credits.now() - interval '180 days'
           order by e.account_id) o
   where credits._is_idle(o.account_id);
  return v_repeated;
end $$;
comment on function credits.repeat_erasures() is
'Erases once more what came in since of the accounts that were erased in the last 180 days; answers how many.

Stripe tells of refunds, disputes and the end of a customer long after. Meant for a job every week. An account on which it
fails is passed over; the notification erasure_failed names it.';

-- The job repeat_erasures.
create or replace function credits._repeat_erasures(max_rows integer)
returns bigint
language sql
as $$
  select credits.repeat_erasures()
$$;

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._erased_again(account_id text)
returns boolean
language plpgsql
as $$
begin
  perform credits.erase_account(_erased_again.account_id);
  return true;
exception when others then
  perform credits._notify_failure('erasure_failed', _erased_again.account_id, sqlerrm, sqlstate);
  return false;
end $$;

create or replace function credits._in_use(account_id text)
returns jsonb
language sql
stable
as $$
  select jsonb_build_object(
           'reservations', (select count(*) from credits.reservations r
                             where r.account_id = _in_use.account_id and r.status = 'open'),
           'subscriptions', (select count(*) from credits.subscriptions s
                               join credits.subscription_states t on t.state = s.state
                              where s.account_id = _in_use.account_id and s.source = 'stripe' and not t.terminal),
           'requests', (select count(*) from credits.stripe_requests r
                         where r.account_id = _in_use.account_id and r.state in ('queued', 'sent')),
           'top_ups', num_nonnulls(credits._open_top_up(_in_use.account_id)))
$$;

create or replace function credits._is_idle(account_id text)
returns boolean
language sql
stable
as $$
  select not jsonb_path_exists(credits._in_use(_is_idle.account_id), '$.* ? (@ > 0)')
$$;

create or replace function credits._check_idle(account_id text)
returns void
language plpgsql
stable
as $$
begin
  if not credits._is_idle(_check_idle.account_id) then
    perform credits._fail(409, 'account_in_use', credits._in_use(_check_idle.account_id),
      'Settle or release its reservations (or release_holds => true), cancel its subscription at Stripe and wait for the '
      'event, and let its requests to Stripe be answered and its top-up be paid or fail.');
  end if;
end $$;

-- A dispute that is won, or a refund that fails, after the first time brings credits back, which are taken again.
create or replace function credits._forfeit(account_id text)
returns numeric
language sql
as $$
  select coalesce(sum(-(r.result).amount), 0)
    from (select credits.revoke_grant(g.account_id, g.grant_id, g.remaining, null,
                                      concat_ws(':', 'erase', g.grant_id, g.times)) as result
            from (select l.*, e.times
                    from credits.grants l left join credits.erasures e on e.account_id = l.account_id
                   where l.account_id = _forfeit.account_id and l.status in ('pending', 'active') and l.remaining > 0
                   order by l.grant_id offset 0) g) r
$$;

create or replace function credits._close_account(account_id text)
returns void
language sql
as $$
  update credits.accounts a set status = 'closed' where a.account_id = _close_account.account_id;
  update credits.balances b set status = 'closed' where b.account_id = _close_account.account_id;
$$;
