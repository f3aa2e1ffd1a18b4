\set account random(:first, :last)
select * from credits.get_balance('acct_' || :account);
