-- Offers of any price, with all that a use of one asks of the catalogue; they are worked out anew by each deploy. A use knows its
-- price, and the windows that it is to be counted in.
set local role credits_owner;

delete from credits.offers;
alter table credits.offers
  drop constraint offers_have_one_simple_price,
  add column limited boolean not null,
  add column unit    text,
  add column price   jsonb   not null,
  add constraint offers_have_one_simple_price_at_most check (num_nonnulls(flat, unit_price) <= 1);
comment on table credits.offers is
  'What plans offer and at what price, worked out of the catalogue by _work_out_offers(). A shortcut of check_access() and authorize_usage(), which ask what limits leave themselves: what is not here is found the general way.';
comment on column credits.offers.limited is 'Whether the plan limits it, or all that it offers together.';
comment on column credits.offers.unit is 'What the units of a call are; null if the price counts no such.';
comment on column credits.offers.price is 'That of the rate. flat or unit_price says the same sooner, where it is that simple.';

create type credits.use_window as (capability text, period text, window_start timestamptz);
create type credits.limit_asked as (
  capability text, measure text, period text, maximum numeric, time_zone text, since timestamptz, used numeric, has_room boolean);
alter type credits.use
  add attribute price   jsonb,
  add attribute windows credits.use_window[];
