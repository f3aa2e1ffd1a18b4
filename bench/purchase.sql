\set account random(:first, :last)
\set session random(1000000000, 9000000000000000000)
select * from credits.receive_stripe_event('bench', floor.paid_session(:account, :session));
