-- Gifts between two accounts.
-- Lock order: both balances rows in the order of account_id, then as 10_accounts.sql says.

create or replace function credits.transfer_credits(
  from_account_id text,
  to_account_id   text,
  amount          numeric,
  description     text  default null,
  key             text  default null,
  metadata        jsonb default null
)
returns credits.transfer_result
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_amount numeric := credits._check_amount(transfer_credits.amount);
  v_print  jsonb   := credits._fingerprint(jsonb_build_object(
                        'amount', v_amount, 'to_account_id', transfer_credits.to_account_id,
                        'description', transfer_credits.description), transfer_credits.metadata);
  v_at     timestamptz;
  v_from   credits.balances;
  v_to     credits.balances;
  v_entry  credits.entries;
  v_slices credits.slices;
begin
  perform credits._check_key(transfer_credits.key, 'key');
  perform credits._check_metadata(transfer_credits.metadata);
  if transfer_credits.from_account_id = transfer_credits.to_account_id then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'to_account_id'),
      'Credits go to another account.');
  end if;

  -- Both are locked before what is due is booked: while the second lock is waited for, credits of the first may end.
  perform credits._lock_accounts(array[transfer_credits.from_account_id, transfer_credits.to_account_id]);
  v_at   := credits.now();
  v_from := credits._lock_account(transfer_credits.from_account_id);
  v_to   := credits._lock_account(transfer_credits.to_account_id);

  v_entry := credits._first_entry(transfer_credits.from_account_id, 'transfer', transfer_credits.key, v_print,
                                  uses => true);
  if v_entry.entry_seq is not null then
    return credits._transfer_result(v_entry, transfer_credits.to_account_id, true);
  end if;

  perform credits._check_open(transfer_credits.to_account_id);
  v_slices := credits._take(transfer_credits.from_account_id, v_amount);
  if v_slices.taken < v_amount or v_from.debt > 0 then
    perform credits._fail_short(v_amount, v_slices.taken, v_from.debt);
  end if;
  v_entry.account_id  := transfer_credits.from_account_id;
  v_entry.kind        := 'transfer_out';
  v_entry.operation   := 'transfer';
  v_entry.key         := transfer_credits.key;
  v_entry.fingerprint := v_print;
  v_entry.amount      := -v_amount;
  v_entry.description := transfer_credits.description;
  v_entry.metadata    := transfer_credits.metadata;
  v_entry := credits._post(v_from, v_entry, v_slices);
  perform credits._receive_gift(v_to, v_entry, v_at);
  if v_entry.available_after < v_from.topup_below then
    perform credits._after_debit(v_entry.account_id);
  end if;
  return credits._transfer_result(v_entry, transfer_credits.to_account_id, false);
end $$;
comment on function credits.transfer_credits(text, text, numeric, text, text, jsonb) is
'Gives credits to another account, as grants of kind gift that keep the expiry and the cost of what was given.

Only credits without a scope can be given. The receiver''s debt is paid first. key is required, and belongs to the giver.
Errors: 400 invalid_request, 402 insufficient_credits, 404 account_not_found, 409 idempotency_conflict,
422 invalid_amount, 423 account_frozen, account_closed.';

-- Helpers ------------------------------------------------------------------------------------------------------------

-- What was given keeps the expiry and the cost of the grants it came from: no transfer makes credits live longer. It starts
-- at a moment at which what was given had not ended.
drop function if exists credits._receive_gift(credits.balances, credits.entries);
create or replace function credits._receive_gift(
  balance credits.balances,
  given   credits.entries,
  at      timestamptz
)
returns void
language plpgsql
as $$
declare
  v_gift  record;
  v_grant credits.grants;
  v_entry credits.entries;
begin
  for v_gift in
    select g.expires_at, g.cost_currency, sum(s.amount) as amount, floor(sum(g.cost * s.amount / g.amount))::bigint as cost
      from unnest((_receive_gift.given).grant_ids, (_receive_gift.given).grant_amounts) s (grant_id, amount)
      join credits.grants g on g.account_id = (_receive_gift.given).account_id and g.grant_id = s.grant_id
     group by g.expires_at, g.cost_currency
     order by g.expires_at nulls last, g.cost_currency
  loop
    v_grant := credits._insert_grant((_receive_gift.balance).account_id, v_gift.amount, 'gift', _receive_gift.at, v_gift.expires_at,
      description => (_receive_gift.given).description, source => 'transfer:' || (_receive_gift.given).account_id,
      cost => v_gift.cost, cost_currency => v_gift.cost_currency);
    v_entry             := null;
    v_entry.account_id  := v_grant.account_id;
    v_entry.kind        := 'transfer_in';
    v_entry.operation   := 'transfer';
    v_entry.amount      := v_gift.amount;
    v_entry.description := (_receive_gift.given).description;
    v_entry.metadata    := (_receive_gift.given).metadata;
    perform credits._post(credits._balance(v_grant.account_id), v_entry,
                          credits._slice(v_grant.grant_id, v_gift.amount));
  end loop;
  perform credits._tidy((_receive_gift.balance).account_id);
end $$;

create or replace function credits._transfer_result(
  entry         credits.entries,
  to_account_id text,
  replayed      boolean
)
returns credits.transfer_result
language sql
immutable
as $$
  select row((_transfer_result.entry).entry_seq, (_transfer_result.entry).account_id, _transfer_result.to_account_id,
             -(_transfer_result.entry).amount, (_transfer_result.entry).balance_after, (_transfer_result.entry).available_after,
             (_transfer_result.entry).created_at, _transfer_result.replayed)::credits.transfer_result
$$;
