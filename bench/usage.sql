\set account random(:first, :last)
\set request random(1, 9000000000000000000)
select * from credits.authorize_usage('user_' || :account, 'chapter', 1200, 'best', 'job_' || :request);
select * from credits.settle_usage('user_' || :account, 'job_' || :request, 1000);
