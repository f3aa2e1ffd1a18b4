-- Offers of any price, with all that a use of one asks of the catalogue. They are worked out anew by each deploy.
set local role credits_owner;

delete from credits.offers;
alter table credits.offers
  drop constraint offers_have_one_simple_price,
  add column limited boolean not null,
  add column unit    text,
  add column price   jsonb   not null,
  add constraint offers_have_one_simple_price_at_most check (num_nonnulls(flat, unit_price) <= 1);
comment on column credits.offers.limited is 'Whether the plan limits it, or all that it offers together.';
comment on column credits.offers.unit is 'What the units of a call are; null if the price counts no such.';
comment on column credits.offers.price is 'That of the rate. flat or unit_price says the same sooner, where it is that simple.';

alter type credits.use add attribute price jsonb;
