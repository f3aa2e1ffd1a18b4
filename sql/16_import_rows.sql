-- Reading the rows of an import: each becomes an import_row, with the first thing that is wrong with it.

create or replace function credits._read_import(balances jsonb)
returns credits.import_row[]
language sql
stable
as $$
  select coalesce(array_agg(credits._import_row(b.position, b.input, t.at) order by b.position), '{}')
    from (select credits.now() as at) t,
         jsonb_array_elements(_read_import.balances) with ordinality b (input, position)
$$;

-- A row with the first thing that is wrong with it, if anything is. Empty texts are no values, as in a CSV file.
create or replace function credits._import_row(
  place bigint,
  input jsonb,
  at    timestamptz
)
returns credits.import_row
language plpgsql
stable
as $$
declare
  v_row     credits.import_row;
  v_amount  text := _import_row.input ->> 'amount';
  v_expires text := nullif(_import_row.input ->> 'expires_at', '');
  v_cost    text := nullif(_import_row.input ->> 'cost', '');
begin
  v_row.position      := _import_row.place;
  v_row.account_id    := _import_row.input ->> 'account_id';
  v_row.key           := _import_row.input ->> 'key';
  v_row.amount        := case when v_amount ~ E'^[0-9]{1,40}(\\.[0-9]{0,40})?$' then trim_scale(v_amount::numeric) end;
  v_row.kind          := coalesce(nullif(_import_row.input ->> 'kind', ''), 'bonus');
  v_row.expires_at    := credits._any_moment(v_expires);
  v_row.cost          := case when v_cost ~ '^[0-9]{1,18}$' then v_cost::bigint end;
  v_row.cost_currency := lower(nullif(_import_row.input ->> 'cost_currency', ''));
  v_row.description   := nullif(_import_row.input ->> 'description', '');
  v_row.email         := nullif(_import_row.input ->> 'email', '');
  v_row.account_kind  := nullif(_import_row.input ->> 'account_kind', '');
  v_row.plan          := nullif(_import_row.input ->> 'plan', '');
  v_row.argument      := case when jsonb_typeof(_import_row.input) <> 'object' then 'row'
                              when v_cost is not null and v_row.cost is null    then 'cost'
                              when v_expires is not null and v_row.expires_at is null then 'expires_at'
                              else credits._import_argument(v_row, _import_row.at) end;
  v_row.problem       := credits._import_hint(v_row.argument);
  v_row.fingerprint   := jsonb_strip_nulls(jsonb_build_object(
    'import', true, 'amount', v_row.amount, 'kind', v_row.kind, 'expires_at', extract(epoch from v_row.expires_at),
    'cost', v_row.cost, 'cost_currency', v_row.cost_currency, 'description', v_row.description));
  return v_row;
end $$;

-- What of a row is wrong, if anything is.
create or replace function credits._import_argument(
  input credits.import_row,
  at    timestamptz
)
returns text
language plpgsql
stable
as $$
declare
  v_row credits.import_row := _import_argument.input;
begin
  if v_row.plan is not null and not exists (select from credits.plans p where p.code = v_row.plan and p.active) then
    return 'plan';
  end if;
  return case
    when (length(v_row.key) between 1 and 240) is not true                   then 'key'
    when (length(v_row.account_id) between 1 and 200) is not true            then 'account_id'
    when (credits._is_amount(v_row.amount) and v_row.amount > 0) is not true then 'amount'
    when credits._default_priority(v_row.kind) is null                       then 'kind'
    when v_row.expires_at <= _import_argument.at or not credits._is_moment(v_row.expires_at) then 'expires_at'
    when num_nonnulls(v_row.cost, v_row.cost_currency) = 1
         or v_row.cost_currency !~ '^[a-z]{3}$'                              then 'cost_currency'
    when v_row.account_kind not in ('user', 'organization')                  then 'account_kind' end;
end $$;

create or replace function credits._import_hint(argument text)
returns text
language sql
immutable
as $$
  select case _import_hint.argument
    when 'row'           then 'A row is an object.'
    when 'key'           then 'key is required: the id of the row in the old system, 1 to 240 characters.'
    when 'account_id'    then 'account_id is required: 1 to 200 characters.'
    when 'amount'        then 'An amount is a number above 0 and below 1e12 with at most 6 decimals.'
    when 'kind'          then 'kind is plan, trial, promo, bonus, gift or purchase.'
    when 'expires_at'    then 'expires_at is a moment to come, such as 2030-01-31T12:00:00Z. What has expired stays out.'
    when 'cost'          then 'cost is a whole number, in the minor unit of cost_currency.'
    when 'cost_currency' then 'cost and cost_currency, such as usd, come together.'
    when 'account_kind'  then 'account_kind is user or organization.'
    when 'plan'          then 'There is no such plan on sale.' end
$$;

-- Null for what is none. Without a zone it is one of UTC.
create or replace function credits._any_moment(value text)
returns timestamptz
language plpgsql
stable
as $$
begin
  return case when _any_moment.value !~ E'^\\d{4}-\\d\\d-\\d\\d([T ]\\d\\d:\\d\\d|$)' then null
              when _any_moment.value ~ E'^\\d{4}-\\d\\d-\\d\\d([T ]\\d\\d:\\d\\d(:\\d\\d(\\.\\d+)?)?)?$'
                then _any_moment.value::timestamp at time zone 'UTC'
              else _any_moment.value::timestamptz end;
exception when data_exception then
  return null;
end $$;
