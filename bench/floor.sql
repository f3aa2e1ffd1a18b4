\set account random(:first, :last)
with charged as (
  update floor.balances b
     set balance = b.balance - 1, seq = b.seq + 1
   where b.account_id = 'acct_' || :account
  returning b.account_id, b.seq, b.balance
)
insert into floor.entries (account_id, seq, amount, balance_after)
select c.account_id, c.seq, -1, c.balance
  from charged c;
