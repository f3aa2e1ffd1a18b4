-- What reservations do to grants and entries: cutting a hold, ending it, and closing with the outcome.
-- Keeps invariants 3 and 4. The caller holds the lock of the account.

-- The held slices, cut at an amount: the first ones are used, the rest stay.
create or replace function credits._split(
  hold   credits.reservations,
  amount numeric
)
returns credits.split
language plpgsql
immutable
as $$
declare
  v_ids     bigint[]  := (_split.hold).grant_ids;
  v_amounts numeric[] := (_split.hold).grant_amounts;
  v_open    numeric   := _split.amount;
  v_use     numeric;
  v_used    credits.slices;
  v_rest    credits.slices;
begin
  v_used.taken := 0;
  v_rest.taken := 0;
  for v_place in 1 .. cardinality(v_ids) loop
    v_use  := least(v_open, v_amounts[v_place]);
    v_open := v_open - v_use;
    if v_use > 0 then
      v_used.grant_ids := v_used.grant_ids || v_ids[v_place];
      v_used.amounts   := v_used.amounts || v_use;
      v_used.taken     := v_used.taken + v_use;
    end if;
    if v_use < v_amounts[v_place] then
      v_rest.grant_ids := v_rest.grant_ids || v_ids[v_place];
      v_rest.amounts   := v_rest.amounts || (v_amounts[v_place] - v_use);
      v_rest.taken     := v_rest.taken + v_amounts[v_place] - v_use;
    end if;
  end loop;
  return row(v_used, v_rest)::credits.split;
end $$;

create or replace function credits._use_held(
  account_id text,
  slices     credits.slices
)
returns void
language plpgsql
as $$
begin
  for v_place in 1 .. cardinality((_use_held.slices).grant_ids) loop
    update credits.grants g
       set held     = g.held - (_use_held.slices).amounts[v_place],
           consumed = g.consumed + (_use_held.slices).amounts[v_place],
           status   = case when g.status = 'active' and g.remaining = 0 and g.held = (_use_held.slices).amounts[v_place]
                           then 'exhausted' else g.status end
     where g.account_id = _use_held.account_id and g.grant_id = (_use_held.slices).grant_ids[v_place];
  end loop;
end $$;

create or replace function credits._reservation_entry(
  hold        credits.reservations,
  kind        text,
  key         text,
  fingerprint jsonb,
  amount      numeric,
  metadata    jsonb default null
)
returns credits.entries
language plpgsql
immutable
as $$
declare
  v_entry credits.entries;
begin
  v_entry.account_id     := (_reservation_entry.hold).account_id;
  v_entry.kind           := _reservation_entry.kind;
  v_entry.operation      := _reservation_entry.kind;
  v_entry.key            := _reservation_entry.key;
  v_entry.fingerprint    := _reservation_entry.fingerprint;
  v_entry.amount         := _reservation_entry.amount;
  v_entry.reservation_id := (_reservation_entry.hold).reservation_id;
  v_entry.subject        := (_reservation_entry.hold).subject;
  v_entry.member_id      := (_reservation_entry.hold).member_id;
  v_entry.capability     := (_reservation_entry.hold).capability;
  v_entry.description    := (_reservation_entry.hold).description;
  v_entry.metadata       := coalesce(_reservation_entry.metadata, (_reservation_entry.hold).metadata);
  return v_entry;
end $$;

-- An open hold pays first; above it the policy decides. An expired one holds nothing, so all of it is overage.
create or replace function credits._settle_hold(
  balance  credits.balances,
  hold     credits.reservations,
  amount   numeric,
  policy   text,
  request  jsonb,
  metadata jsonb
)
returns credits.reservations
language plpgsql
as $$
declare
  v_hold    credits.reservations := _settle_hold.hold;
  v_balance credits.balances := _settle_hold.balance;
  v_held    numeric := 0;
  v_debt    numeric := 0;
  v_slices  credits.slices;
  v_entry   credits.entries;
begin
  v_slices := credits._end_hold(v_hold, _settle_hold.amount);
  if v_hold.status = 'open' then
    v_held := v_hold.amount - v_hold.captured;
  end if;
  if _settle_hold.amount > v_slices.taken then
    v_slices := credits._take_overage(v_balance, v_hold, v_slices, _settle_hold.amount - v_slices.taken, _settle_hold.policy);
    v_debt   := credits._overdraft(v_balance, _settle_hold.amount - v_slices.taken, _settle_hold.policy);
  end if;

  if v_slices.taken > 0 then
    v_entry := credits._reservation_entry(v_hold, 'settle', v_hold.reservation_id, _settle_hold.request, -v_slices.taken,
                                          _settle_hold.metadata);
    v_entry := credits._post(v_balance, v_entry, v_slices, held => -v_held);
  elsif v_held > 0 then
    update credits.balances b
       set held = b.held - v_held
     where b.account_id = v_hold.account_id
    returning b.* into v_balance;
  end if;
  if v_debt > 0 then
    v_entry := credits._post_overdraft(v_hold, v_debt, _settle_hold.request, v_entry.key is null);
  end if;
  if v_held > _settle_hold.amount and (v_balance.debt > 0 or v_slices.ended) then
    v_balance := credits._tidy(v_hold.account_id);
  elsif v_entry.entry_seq is not null then
    v_balance.entry_seq := v_entry.entry_seq;
    v_balance.balance   := v_entry.balance_after;
  end if;
  return credits._close(v_hold, 'settled', v_balance, _settle_hold.request, _settle_hold.amount, v_slices.taken + v_debt, v_entry);
end $$;

-- The first slices of a hold are used up to an amount, the others return. Answers with what was used.
create or replace function credits._end_hold(
  hold   credits.reservations,
  amount numeric
)
returns credits.slices
language plpgsql
as $$
declare
  v_hold   credits.reservations := _end_hold.hold;
  v_open   numeric := _end_hold.amount;
  v_use    numeric;
  v_ends   timestamptz;
  v_slices credits.slices;
begin
  v_slices.taken := 0;
  v_slices.ended := false;
  for v_place in 1 .. cardinality(v_hold.grant_ids) loop
    v_use  := least(v_open, v_hold.grant_amounts[v_place]);
    v_open := v_open - v_use;
    update credits.grants g
       set held      = g.held - v_hold.grant_amounts[v_place],
           consumed  = g.consumed + v_use,
           remaining = g.remaining + v_hold.grant_amounts[v_place] - v_use,
           status    = case when v_use < v_hold.grant_amounts[v_place] then 'active'
                            when g.status = 'active' and g.remaining = 0 and g.held = v_use then 'exhausted'
                            else g.status end
     where g.account_id = v_hold.account_id and g.grant_id = v_hold.grant_ids[v_place]
    returning g.expires_at into v_ends;
    v_slices.ended := v_slices.ended or coalesce(v_ends <= credits.now(), false);
    if v_use > 0 then
      v_slices.grant_ids := v_slices.grant_ids || v_hold.grant_ids[v_place];
      v_slices.amounts   := v_slices.amounts || v_use;
      v_slices.taken     := v_slices.taken + v_use;
    end if;
  end loop;
  return v_slices;
end $$;

-- All of a hold returns: released by its owner, or run out.
drop function if exists credits._expire_reservation(text, text, timestamptz);
create or replace function credits._return_hold(
  hold    credits.reservations,
  status  text,
  request jsonb       default null,
  at      timestamptz default credits.now()
)
returns credits.balances
language plpgsql
as $$
declare
  v_hold    credits.reservations := _return_hold.hold;
  v_balance credits.balances;
begin
  perform credits._end_hold(v_hold, 0);
  update credits.balances b set held = b.held - (v_hold.amount - v_hold.captured) where b.account_id = v_hold.account_id;
  v_balance := credits._tidy(v_hold.account_id, _return_hold.at);
  perform credits._close(v_hold, _return_hold.status, v_balance, _return_hold.request);
  return v_balance;
end $$;

-- The reservation is the stored result of the call that closes it. The one place where counted ones end, and those that had
-- run out before their member was added.
create or replace function credits._close(
  hold    credits.reservations,
  status  text,
  balance credits.balances,
  request jsonb           default null,
  actual  numeric         default null,
  charged numeric         default null,
  entry   credits.entries default null
)
returns credits.reservations
language plpgsql
as $$
declare
  v_hold      credits.reservations;
  v_available numeric := (_close.entry).available_after;
begin
  if (_close.entry).entry_seq is distinct from (_close.balance).entry_seq then
    v_available := trim_scale(credits._free(_close.balance) - (_close.balance).debt);
  end if;
  update credits.reservations r
     set status        = _close.status,
         closed_at     = credits.now(),
         actual        = _close.actual,
         charged       = trim_scale(_close.charged),
         uncollected   = trim_scale(_close.actual - _close.charged),
         late          = (_close.hold).status = 'expired',
         settle_seq    = (_close.entry).entry_seq,
         grant_ids     = '{}',
         grant_amounts = '{}',
         closing       = jsonb_build_object('request', _close.request, 'balance', (_close.balance).balance,
                                            'available', v_available)
   where r.account_id = (_close.hold).account_id and r.reservation_id = (_close.hold).reservation_id
  returning r.* into v_hold;
  if v_hold.counted or v_hold.late and credits._is_listed(v_hold.account_id, v_hold.member_id) then
    perform credits._count_end(_close.hold, v_hold);
    perform credits._close_usage(_close.hold, _close.status, _close.charged);
  end if;
  return v_hold;
end $$;
