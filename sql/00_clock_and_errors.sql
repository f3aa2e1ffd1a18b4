-- The clock, the errors, the settings and the checks of arguments: what every other file calls.

create or replace function credits.now()
returns timestamptz
language sql
as $$
  select clock_timestamp()
$$;
comment on function credits.now() is
'The engine''s clock, and its only source of time.

Read after the lock of the account is taken, so that the moments of one account''s entries follow their numbers. Tests
replace this function inside their own transaction to travel in time.';

-- PTnnn is the HTTP status in PostgREST''s convention. RAISE refuses null options, and the message becomes a reason phrase.
-- Where a code says it all, the hint is the code as a sentence: Plan not found.
create or replace function credits._fail(
  status integer,
  code   text,
  detail jsonb default null,
  hint   text  default null
)
returns void
language plpgsql
as $$
begin
  raise exception using
    errcode = 'PT' || _fail.status,
    message = _fail.code,
    detail  = coalesce(_fail.detail, '{}')::text,
    hint    = coalesce(_fail.hint, upper(left(_fail.code, 1)) || translate(substr(_fail.code, 2), '_', ' ') || '.');
end $$;

insert into credits.settings as s (name, value, summary) values
  ('reservation_max_age', '"24 hours"', 'How long after its reserve() a reservation may be kept open by extend().')
on conflict (name) do update set summary = excluded.summary;

create or replace function credits._setting(name text)
returns jsonb
language sql
stable
as $$
  select s.value from credits.settings s where s.name = _setting.name
$$;

-- The same time without days: how long these are depends on the time zone of the session.
create or replace function credits._exact(span interval)
returns interval
language sql
immutable
as $$
  select make_interval(secs => extract(epoch from _exact.span)::double precision)
$$;

-- Whether a moment has a year of four digits in UTC, as JSON and the dates of most languages do; infinity has none.
create or replace function credits._is_moment(at timestamptz)
returns boolean
language sql
immutable
as $$
  select _is_moment.at between timestamptz '0001-01-01 00:00Z' and timestamptz '9999-12-31 23:59:59.999999Z'
$$;

-- Checks return what they have checked: an assignment is evaluated in place, while PERFORM runs a query.

-- Amounts are numeric with at most 6 decimals; the upper bound also stops NaN and Infinity.
create or replace function credits._is_amount(amount numeric)
returns boolean
language sql
immutable
as $$
  select amount >= 0 and amount < 1e12 and amount = round(amount, 6)
$$;

-- What a verb that moves credits is given: an amount above zero, a key, and perhaps metadata.
create or replace function credits._is_request(
  amount   numeric,
  key      text,
  metadata jsonb
)
returns boolean
language sql
immutable
as $$
  select credits._is_amount(_is_request.amount) and _is_request.amount > 0
         and _is_request.key <> '' and length(_is_request.key) <= 255
         and coalesce(jsonb_typeof(_is_request.metadata), 'object') = 'object'
$$;

create or replace function credits._check_amount(
  amount numeric,
  zero   boolean default false
)
returns numeric
language plpgsql
immutable
as $$
begin
  if (credits._is_amount(_check_amount.amount) and (_check_amount.amount > 0 or _check_amount.zero)) is not true then
    perform credits._fail(422, 'invalid_amount',
      jsonb_build_object('amount', _check_amount.amount::text),
      case when _check_amount.zero then 'An amount is a number from 0 to below 1e12 with at most 6 decimals.'
           else 'An amount is a number above 0 and below 1e12 with at most 6 decimals.' end);
  end if;
  return trim_scale(_check_amount.amount);
end $$;

create or replace function credits._check_key(
  key      text,
  name     text,
  max_size integer default 255
)
returns text
language plpgsql
immutable
as $$
begin
  if (_check_key.key <> '' and length(_check_key.key) <= _check_key.max_size) is not true then
    perform credits._fail(400, 'invalid_request',
      jsonb_build_object('argument', _check_key.name, 'length', coalesce(length(_check_key.key), 0)),
      format('%s is required: a text of 1 to %s characters, chosen by the caller, the same on every retry.',
             _check_key.name, _check_key.max_size));
  end if;
  return _check_key.key;
end $$;

-- Null passes: it is the default of whoever asks.
create or replace function credits._check_word(
  word  text,
  name  text,
  words text[]
)
returns text
language plpgsql
immutable
as $$
begin
  if _check_word.word <> all (_check_word.words) then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', _check_word.name),
      format('%s is %s or %s.', _check_word.name, array_to_string(trim_array(_check_word.words, 1), ', '),
             _check_word.words[cardinality(_check_word.words)]));
  end if;
  return _check_word.word;
end $$;

drop function if exists credits._check_rows(integer, text);
create or replace function credits._check_rows(
  rows    integer,
  name    text,
  highest integer default 1000
)
returns integer
language plpgsql
immutable
as $$
begin
  if (_check_rows.rows between 1 and _check_rows.highest) is not true then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', _check_rows.name),
      format('%s is a number from 1 to %s.', _check_rows.name, _check_rows.highest));
  end if;
  return _check_rows.rows;
end $$;

create or replace function credits._check_metadata(metadata jsonb)
returns jsonb
language plpgsql
immutable
as $$
begin
  if jsonb_typeof(_check_metadata.metadata) <> 'object' then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', 'metadata'),
      'metadata is a JSON object.');
  end if;
  return _check_metadata.metadata;
end $$;

-- The arguments of a call, for comparison with those of the first call of its key. Null is the same as not given, but
-- inside the caller's metadata null is a value.
create or replace function credits._fingerprint(
  arguments jsonb,
  metadata  jsonb
)
returns jsonb
language sql
stable
as $$
  select jsonb_strip_nulls(_fingerprint.arguments)
         || case when _fingerprint.metadata is null then '{}' else jsonb_build_object('metadata', _fingerprint.metadata) end
$$;

create or replace function credits._check_same(
  stored    jsonb,
  given     jsonb,
  operation text,
  key       text
)
returns void
language plpgsql
immutable
as $$
begin
  if _check_same.stored is distinct from _check_same.given then
    perform credits._fail(409, 'idempotency_conflict',
      jsonb_build_object('operation', _check_same.operation, 'key', _check_same.key,
                         'first', _check_same.stored, 'now', _check_same.given),
      'This key was used with other arguments. A retry repeats them; a new request takes a new key.');
  end if;
end $$;
comment on function credits._check_same(jsonb, jsonb, text, text) is
  'Compares fingerprints as jsonb, so that 5 equals 5.0.';

-- As fingerprints hold it, whatever style the session writes intervals in: some clients set another one.
create or replace function credits._interval_text(span interval)
returns text
language sql
stable
strict
set intervalstyle = 'postgres'
as $$
  select _interval_text.span::text
$$;
