-- A reservation as it stands: its outcome, as settle() and release() tell it, and what it holds or held.
set local role credits_owner;

create type credits.reservation_row as (
  reservation_id text, account_id text, status text, actual numeric, charged numeric, uncollected numeric, released numeric,
  late boolean, entry_seq bigint, balance numeric, available numeric, replayed boolean, amount numeric, captured numeric,
  held numeric, created_at timestamptz, expires_at timestamptz, closed_at timestamptz, subject text, member_id text,
  capability text, description text, metadata jsonb);
