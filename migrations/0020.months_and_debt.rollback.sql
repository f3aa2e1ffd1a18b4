set local role credits_owner;
alter type credits.freed_slice drop attribute month_key;
