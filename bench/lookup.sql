\set account random(:first, :last)
select balance from floor.balances where account_id = 'acct_' || :account;
