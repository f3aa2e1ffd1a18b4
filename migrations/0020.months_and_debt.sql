-- Months that nobody has booked pay a debt in the order of time, as pending grants do when they start.
set local role credits_owner;
alter type credits.freed_slice add attribute month_key text;
