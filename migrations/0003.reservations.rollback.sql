set local role credits_owner;
drop type credits.reserve_result, credits.reservation_result, credits.settle_result, credits.split;
drop table credits.reservations;
