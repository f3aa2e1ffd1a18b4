set local role credits_owner;
drop type credits.reservation_row;
