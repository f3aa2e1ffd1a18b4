\set account random(:first, :last)
\set request random(1, 9000000000000000000)
select * from floor.reserve('acct_' || :account, 2, 'job_' || :request);
select * from floor.settle('acct_' || :account, 'job_' || :request, 1);
