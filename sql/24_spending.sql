-- Spending, and giving back.
-- Keeps promise 1, never oversold: credits are chosen and taken under the lock of the account. Lock order: see
-- 10_accounts.sql.

create or replace function credits.spend(
  account_id  text,
  amount      numeric,
  description text  default null,
  subject     text  default null,
  member_id   text  default null,
  capability  text  default null,
  key         text  default null,
  metadata    jsonb default null
)
returns credits.entry_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount  numeric;
  v_balance numeric;
  v_free    numeric;
  v_below   numeric;
  v_place   tid;
  v_grants  bigint[];
  v_at      timestamptz;
  v_seq     bigint;
  v_head    bytea;
  v_result  credits.entry_result;
begin
  -- Rows of a locked account stay where they are: what follows finds them by their place.
  select trim_scale(spend.amount), trim_scale(b.balance - spend.amount), trim_scale(b.balance - b.held - spend.amount),
         b.topup_below, b.ctid
    into v_amount, v_balance, v_free, v_below, v_place
    from credits.balances b
   where b.account_id = spend.account_id and b.status = 'active' and credits._is_plain(b)
     and credits._would_be_low(b, spend.amount) is not true
     and credits._is_request(spend.amount, spend.key, spend.metadata)
     for no key update;

  -- Mostly the first grant pays, and something is left of it. If it does not, or the key is known, nothing has happened
  -- yet. What listed members use is counted, and goes the general way.
  if found and (spend.member_id is null or not credits._is_listed(spend.account_id, spend.member_id)) then
    update credits.grants g
       set remaining = g.remaining - v_amount, consumed = g.consumed + v_amount
     where g.account_id = spend.account_id
       and g.ctid = (select p.place from credits._payers(spend.account_id, spend.capability) p limit 1)
       and g.remaining > v_amount
       and not exists (select from credits.entries e
                        where e.account_id = spend.account_id and e.operation = 'spend' and e.key = spend.key)
    returning array[g.grant_id], credits.now() into v_grants, v_at;
    if found then
      update credits.balances b
         set balance   = v_balance,
             entry_seq = b.entry_seq + 1,
             hash      = credits._entry_hash(b.hash, row(
                           b.entry_seq + 1, v_at, null, 'spend', 'spend', spend.key, -v_amount, 0, v_balance, v_free,
                           v_grants, array[v_amount], null, null, null, null, null, null, null, null, null
                         )::credits.entries)
       where b.account_id = spend.account_id and b.ctid = v_place
      returning b.entry_seq, b.hash into v_seq, v_head;
      insert into credits.entries as e (entry_seq, created_at, account_id, kind, operation, key, amount, balance_after,
        available_after, grant_ids, grant_amounts, hash, subject, member_id, capability, description, fingerprint,
        metadata)
      values (v_seq, v_at, spend.account_id, 'spend', 'spend', spend.key, -v_amount, v_balance, v_free,
        v_grants, array[v_amount], v_head, spend.subject, spend.member_id, spend.capability, spend.description,
        credits._spend_print(v_amount, spend.description, spend.subject, spend.member_id, spend.capability,
                             spend.metadata), coalesce(spend.metadata, '{}'))
      returning e.entry_seq, e.account_id, e.amount, e.debt, e.balance_after, e.available_after, e.created_at, false
        into v_result;
      if v_free < v_below then
        perform credits._after_debit(spend.account_id);
      end if;
      return v_result;
    end if;
  end if;
  return credits._spend(spend.account_id, spend.amount, spend.description, spend.subject, spend.member_id,
                        spend.capability, spend.key, spend.metadata);
end $$;
comment on function credits.spend(text, numeric, text, text, text, text, text, jsonb) is
'Uses credits at once, all or nothing.

subject names what they were used for in the product''s own words (book:42), member_id who used them. With a capability,
grants that are scoped to it pay too. A member_id that set_member has added is held to its monthly limit. key is required:
the same call with the same key answers with the first result, marked replayed.
Errors: 400 invalid_request, 402 insufficient_credits, 403 forbidden, 404 account_not_found, 409 idempotency_conflict,
422 invalid_amount, 423 account_frozen, account_closed, 429 member_limit_reached.';

create or replace function credits.refund_spend(
  account_id text,
  spend_key  text,
  amount     numeric default null,
  reason     text    default null,
  key        text    default null
)
returns credits.entry_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_print   jsonb := jsonb_strip_nulls(jsonb_build_object(
                       'spend_key', refund_spend.spend_key, 'amount', trim_scale(refund_spend.amount),
                       'reason', refund_spend.reason));
  v_balance credits.balances;
  v_entry   credits.entries;
  v_spend   credits.entries;
  v_left    numeric;
  v_amount  numeric;
  v_slices  credits.slices;
begin
  perform credits._check_key(refund_spend.key, 'key');
  perform credits._check_key(refund_spend.spend_key, 'spend_key');
  v_balance := credits._lock_account(refund_spend.account_id);
  v_entry   := credits._first_entry(refund_spend.account_id, 'refund_spend', refund_spend.key, v_print);
  if v_entry.entry_seq is null then
    v_spend := credits._charge(refund_spend.account_id, refund_spend.spend_key);
    select -v_spend.amount - coalesce(sum(e.amount), 0) into v_left
      from credits.entries e
     where e.account_id = refund_spend.account_id and e.refunds_seq = v_spend.entry_seq;
    v_amount := credits._check_amount(coalesce(refund_spend.amount, v_left));
    if v_amount > v_left then
      perform credits._fail(422, 'invalid_amount', jsonb_build_object('amount', v_amount, 'refundable', v_left),
        'At most what was charged and not yet refunded can be given back.');
    end if;

    v_slices  := credits._refundable_slices(v_spend, -v_spend.amount - v_left, v_amount);
    perform credits._give_back(refund_spend.account_id, v_slices);
    v_entry.account_id     := refund_spend.account_id;
    v_entry.kind           := 'refund';
    v_entry.operation      := 'refund_spend';
    v_entry.key            := refund_spend.key;
    v_entry.fingerprint    := v_print;
    v_entry.amount         := v_amount;
    v_entry.refunds_seq    := v_spend.entry_seq;
    v_entry.reservation_id := v_spend.reservation_id;
    v_entry.subject        := v_spend.subject;
    v_entry.member_id      := v_spend.member_id;
    v_entry.capability     := v_spend.capability;
    v_entry.description    := refund_spend.reason;
    v_entry   := credits._post(v_balance, v_entry, v_slices);
    perform credits._tidy(v_entry.account_id);
    perform credits._count_refund(v_spend, v_amount);
    return credits._entry_result(v_entry, false);
  end if;
  return credits._entry_result(v_entry, true);
end $$;
comment on function credits.refund_spend(text, text, numeric, text, text) is
'Gives used credits back to the very grants that paid.

spend_key is the key of a spend or a capture, or the reservation_id of a settle; where it is several of them, the spend is
meant, else the settle. amount defaults to all that is not yet refunded; several refunds of one charge never exceed it. What
returns pays an open debt first; what belongs to a grant that has expired meanwhile expires at once. Credits that were
charged into debt are not refunded by it. A charge of this month that is given back does not count towards the limit of its
member. key is required.
Errors: 400 invalid_request, 404 account_not_found, spend_not_found, 409 idempotency_conflict, 422 invalid_amount.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- The general way to spend: whatever the account and the call are like.
create or replace function credits._spend(
  account_id  text,
  amount      numeric,
  description text,
  subject     text,
  member_id   text,
  capability  text,
  key         text,
  metadata    jsonb
)
returns credits.entry_result
language plpgsql
as $$
declare
  v_amount  numeric := credits._check_amount(_spend.amount);
  v_key     text    := credits._check_key(_spend.key, 'key');
  v_meta    jsonb   := credits._check_metadata(_spend.metadata);
  v_print   jsonb   := credits._spend_print(v_amount, _spend.description, _spend.subject, _spend.member_id,
                                            _spend.capability, _spend.metadata);
  v_balance credits.balances;
  v_member  credits.members;
  v_entry   credits.entries;
  v_slices  credits.slices;
begin
  v_balance := credits._lock_account(_spend.account_id);
  v_entry   := credits._first_entry(_spend.account_id, 'spend', _spend.key, v_print, uses => true);
  if v_entry.entry_seq is not null then
    return credits._entry_result(v_entry, true);
  end if;

  if _spend.member_id is not null then
    v_member := credits._check_member(_spend.account_id, _spend.member_id, v_amount, credits.now());
  end if;
  v_slices := credits._take(_spend.account_id, v_amount, _spend.capability);
  if v_slices.taken < v_amount or v_balance.debt > 0 then
    perform credits._fail_short(v_amount, v_slices.taken, v_balance.debt);
  end if;
  v_entry.account_id  := _spend.account_id;
  v_entry.kind        := 'spend';
  v_entry.operation   := 'spend';
  v_entry.key         := v_key;
  v_entry.fingerprint := v_print;
  v_entry.amount      := -v_amount;
  v_entry.subject     := _spend.subject;
  v_entry.member_id   := _spend.member_id;
  v_entry.capability  := _spend.capability;
  v_entry.description := _spend.description;
  v_entry.metadata    := v_meta;
  v_entry := credits._post(v_balance, v_entry, v_slices);
  if v_member.member_id is not null then
    perform credits._count_member(_spend.account_id, _spend.member_id, v_amount, v_entry.created_at);
  end if;
  if v_entry.available_after < v_balance.topup_below then
    perform credits._after_debit(_spend.account_id);
  end if;
  return credits._entry_result(v_entry, false);
end $$;

-- The charge that a key names: of a spend, else of a settled reservation, else of a capture.
create or replace function credits._charge(
  account_id text,
  key        text
)
returns credits.entries
language plpgsql
stable
as $$
declare
  v_entry credits.entries;
begin
  select e.* into v_entry
    from credits.entries e
   where e.account_id = _charge.account_id and e.key = _charge.key
     and e.operation in ('spend', 'settle', 'capture') and e.amount < 0
   order by array_position(array['spend', 'settle', 'capture'], e.operation)
   limit 1;
  if not found then
    perform credits._fail(404, 'spend_not_found', jsonb_build_object('spend_key', _charge.key),
      'Name the key of a spend or a capture, or the reservation_id of a settle.');
  end if;
  return v_entry;
end $$;

-- The last slices of the charge that are not yet refunded: what was taken last returns first.
create or replace function credits._refundable_slices(
  charge   credits.entries,
  refunded numeric,
  amount   numeric
)
returns credits.slices
language sql
immutable
as $$
  with slices as (
    select s.grant_id, s.place,
           sum(s.amount) over reverse - s.amount as before,
           sum(s.amount) over reverse            as after
      from unnest((_refundable_slices.charge).grant_ids, (_refundable_slices.charge).grant_amounts) with ordinality s (grant_id, amount, place)
    window reverse as (order by s.place desc)
  ), returned as (
    select s.grant_id, s.place, least(s.after, refunded + amount) - greatest(s.before, refunded) as amount
      from slices s
  )
  select row(array_agg(r.grant_id order by r.place desc), array_agg(r.amount order by r.place desc),
             sum(r.amount), null, null)::credits.slices
    from returned r
   where r.amount > 0
$$;

create or replace function credits._spend_print(
  amount      numeric,
  description text,
  subject     text,
  member_id   text,
  capability  text,
  metadata    jsonb
)
returns jsonb
language sql
stable
as $$
  select credits._fingerprint(jsonb_build_object(
           'amount', _spend_print.amount, 'description', _spend_print.description, 'subject', _spend_print.subject,
           'member_id', _spend_print.member_id, 'capability', _spend_print.capability), _spend_print.metadata)
$$;
