-- Idempotency keys at Stripe are made of these numbers, and Stripe keeps each for a day: another database that uses the same
-- account of Stripe, or one that was made anew, is not to begin with the same ones.
set local role credits_owner;

do $$
begin
  perform setval(pg_get_serial_sequence('credits.stripe_requests', 'request_id'),
                 coalesce(max(r.request_id), 0) + 1 + floor(random() * 1e12)::bigint)
     from credits.stripe_requests r;
end $$;
