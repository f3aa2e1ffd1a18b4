-- What a browser may call: the functions of credits_api, each one call of a function of 87_my_account.sql, bound to it when
-- it is made, so that its caller needs no right on the schema credits. Before the arguments of a _my_ function change, the one
-- here is dropped. Version 1 is frozen: new arguments come last, with a default (tests/contract_v1.txt).

-- What I have --------------------------------------------------------------------------------------------------------

create or replace function credits_api.get_balance(account_id text default null)
returns credits.balance_result
language sql
stable
begin atomic
  select r.*
    from credits._my_balance(get_balance.account_id) r;
end;
comment on function credits_api.get_balance(text) is
'The balance of your account at this instant, in credits.

available is what can be spent now: balance - held - debt, without the credits that are scoped to capabilities. by_kind splits
balance by kind of grant, scoped shows the free credits of each capability, pending what starts later.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.history(
  before_seq bigint  default null,
  max_rows   integer default 50,
  kinds      text[]  default null,
  account_id text    default null
)
returns setof credits_api.history
language sql
stable
begin atomic
  select (select credits._my_account(history.account_id)), h.entry_seq, h.created_at, h.kind, h.amount, h.debt, h.balance_after,
         h.available_after, h.description, h.subject, h.member_id, h.capability, h.reservation_id
    from credits._my_history(history.before_seq, history.max_rows, history.kinds, history.account_id) h;
end;
comment on function credits_api.history(bigint, integer, text[], text) is
'A page of your account''s movements, the latest first.

Page on with before_seq = the last entry_seq seen. kinds limits it to some kinds of entries. max_rows is 1 to 1000, 50 by
default.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.list_reservations(
  max_rows   integer default 50,
  account_id text    default null
)
returns setof credits_api.reservations
language sql
stable
begin atomic
  select r.account_id, r.reservation_id, r.status::text, r.amount::numeric, r.captured::numeric, r.charged::numeric,
         r.created_at, r.expires_at, r.closed_at, r.subject, r.member_id, r.capability, r.description
    from credits._my_reservations(list_reservations.max_rows, list_reservations.account_id) r;
end;
comment on function credits_api.list_reservations(integer, text) is
'The open holds of your account, the first to run out first. The view reservations has the closed ones, too.

max_rows is 1 to 1000, 50 by default.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.prove_balance(account_id text default null)
returns credits.proof_result
language sql
stable
begin atomic
  select r.*
    from credits._my_proof(prove_balance.account_id) r;
end;
comment on function credits_api.prove_balance(text) is
'Recomputes your balance from every single movement and compares it with everything that is stored.

ok is true when nothing is found. hash is the head of the chain of your entries: who keeps it can tell later whether history
was rewritten. It speaks of what is booked; get_balance adds what fell due since.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.list_members(account_id text default null)
returns setof credits.member_result
language sql
stable
begin atomic
  select r.*
    from credits._my_members(list_members.account_id) r;
end;
comment on function credits_api.list_members(text) is
'Who shares the credits of your account, the first added first, with what each has used this month.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

-- What I may use -----------------------------------------------------------------------------------------------------

create or replace function credits_api.get_subscription_state(account_id text default null)
returns credits.subscription_state_result
language sql
stable
begin atomic
  select r.*
    from credits._my_subscription(get_subscription_state.account_id) r;
end;
comment on function credits_api.get_subscription_state(text) is
'How your subscription stands at this instant: state, plan, period, and what is pending. state none is no subscription.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.get_limits(
  member_id  text default null,
  account_id text default null
)
returns setof credits.limit_result
language sql
stable
begin atomic
  select r.*
    from credits._my_limits(get_limits.member_id, get_limits.account_id) r;
end;
comment on function credits_api.get_limits(text, text) is
'Each limit that your plan sets, with what is used of it, what is left, and when there is more again.

With a member_id, that member''s limit, too.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.get_usage(
  group_by   text        default 'day',
  since      timestamptz default null,
  until      timestamptz default null,
  account_id text        default null
)
returns setof credits.usage_summary
language sql
stable
begin atomic
  select r.*
    from credits._my_usage(get_usage.group_by, get_usage.since, get_usage.until, get_usage.account_id) r;
end;
comment on function credits_api.get_usage(text, timestamptz, timestamptz, text) is
'What your credits were used for, by day, subject, capability, quality, model or member.

since is by default the beginning of the month; until is exclusive, by default open.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found.';

create or replace function credits_api.quote(
  capability  text,
  units       numeric default null,
  quality     text    default null,
  model       text    default null,
  unit_counts jsonb   default null,
  account_id  text    default null
)
returns credits.quote_result
language sql
stable
begin atomic
  select r.*
    from credits._my_quote(quote.capability, quote.units, quote.quality, quote.model, quote.unit_counts,
                           quote.account_id) r;
end;
comment on function credits_api.quote(text, numeric, text, text, jsonb, text) is
'What a use of a capability would cost you, in credits, and how the price comes about. Holds nothing.

units counts the capability''s own unit; unit_counts gives several units by name.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found, capability_not_found, quality_not_found,
model_not_found, rate_not_found, 422 invalid_amount.';

create or replace function credits_api.check_access(
  capability  text,
  units       numeric default null,
  quality     text    default null,
  member_id   text    default null,
  model       text    default null,
  unit_counts jsonb   default null,
  account_id  text    default null
)
returns credits.access_result
language sql
stable
begin atomic
  select r.*
    from credits._my_access(check_access.capability, check_access.units, check_access.quality, check_access.member_id,
                            check_access.model, check_access.unit_counts, check_access.account_id) r;
end;
comment on function credits_api.check_access(text, numeric, text, text, text, jsonb, text) is
'Whether you may use a capability now, and if not, the first gate that refuses. Never raises for that.

status, code and detail are those of the error that the product would get. It is a look: nothing is held.
Errors: 400 invalid_request, 401 not_authenticated, 404 account_not_found, capability_not_found, rate_not_found,
422 invalid_amount.';
