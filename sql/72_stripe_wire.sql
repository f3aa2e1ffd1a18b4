-- An answer of Stripe as it comes over the wire: its text, its headers, the second for which it speaks, what of it is kept, and
-- the request that it answers.

create or replace function credits._read_answer(body text)
returns jsonb
language plpgsql
immutable
as $$
begin
  return credits._read_payload(_read_answer.body);
exception when sqlstate 'PT400' then
  return null;
end $$;

-- An answer speaks for the second in which it was asked for: the server's date, less the time that the call took. One that is
-- late, or that Stripe repeats, may be as old as the first call.
create or replace function credits._answered_at(
  request credits.stripe_requests,
  headers jsonb,
  late    boolean
)
returns bigint
language sql
stable
as $$
  select floor(extract(epoch from
           coalesce(credits._http_date(credits._header(_answered_at.headers, 'Date'))
                      - coalesce(greatest(credits.now() - s.sent_at, interval '0'), interval '0'),
                    s.sent_at, (_answered_at.request).created_at)))::bigint
    from (select case when _answered_at.late or credits._header(_answered_at.headers, 'Idempotent-Replayed') = 'true'
                      then (_answered_at.request).first_sent_at else (_answered_at.request).last_sent_at end) s (sent_at)
$$;

create or replace function credits._header(
  headers jsonb,
  name    text
)
returns text
language sql
immutable
as $$
  select coalesce(_header.headers ->> _header.name, _header.headers ->> lower(_header.name))
$$;

-- Such as "Sat, 21 Nov 2026 08:00:00 GMT".
create or replace function credits._http_date(value text)
returns timestamptz
language sql
stable
as $$
  select make_timestamptz(d[3]::integer, array_position(array['Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep',
                          'Oct', 'Nov', 'Dec'], d[2]), d[1]::integer, d[4]::integer, d[5]::integer, d[6]::integer, 'UTC')
    from regexp_match(_http_date.value,
      E'^\\w{3}, (\\d{2}) (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) (\\d{4}) (\\d{2}):(\\d{2}):(\\d{2}) GMT$') d
$$;

-- What we keep to look at later needs neither what authorizes somebody nor what tells of a card or a bank account.
create or replace function credits._without_secrets(answer jsonb)
returns jsonb
language plpgsql
immutable
as $$
declare
  v_names constant text := 'client_secret|secret|last4|dynamic_last4|iban_last4|iin|fingerprint|exp_month|exp_year|'
                           'account_number|routing_number';
begin
  if _without_secrets.answer::text !~ ('"(number|' || v_names || ')":') then
    return _without_secrets.answer;
  elsif jsonb_typeof(_without_secrets.answer) = 'array' then
    return (select jsonb_agg(credits._without_secrets(e.value) order by e.place)
              from jsonb_array_elements(_without_secrets.answer) with ordinality e (value, place));
  elsif jsonb_typeof(_without_secrets.answer) = 'object' then
    return (select coalesce(jsonb_object_agg(m.key, credits._without_secrets(m.value)), '{}')
              from jsonb_each(_without_secrets.answer) m
             where m.key !~ ('^(' || v_names || ')$')
               and (m.key <> 'number' or m.value #>> '{}' !~ '^[0-9 -]{12,23}$'));  -- invoices have numbers, too
  end if;
  return _without_secrets.answer;
end $$;

-- The request that a handler of answer.*, failed.* or again.* was told of. Its row is locked.
create or replace function credits._answered(notice credits.stripe_notice)
returns credits.stripe_requests
language sql
stable
as $$
  select r
    from credits.stripe_requests r
   where r.request_id = substr((_answered.notice).event_id, length('request:') + 1)::bigint
$$;
