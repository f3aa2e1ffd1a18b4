-- stand-in
create or replace function credits._member(account_id text, member_id text) returns credits.members language plpgsql stable as $$
declare v credits.members; begin select m.* into v from credits.members m where m.account_id=_member.account_id and m.member_id=_member.member_id; return v; end $$;
