\set account random(:first, :last)
\set request random(1, 9000000000000000000)
select * from floor.spend('acct_' || :account, 1, 'req_' || :request);
