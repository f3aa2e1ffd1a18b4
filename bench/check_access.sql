\set account random(:first, :last)
select * from credits.check_access('user_' || :account, 'chapter', 1200, 'best');
