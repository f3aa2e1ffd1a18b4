\set account random(:first, :last)
select * from credits.check_access('user_' || :account, 'image', 1, 'best');
