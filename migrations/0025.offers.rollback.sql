set local role credits_owner;
alter type credits.use drop attribute windows, drop attribute price;
drop type credits.limit_asked, credits.use_window;
delete from credits.offers;
alter table credits.offers
  drop constraint offers_have_one_simple_price_at_most,
  drop column price,
  drop column unit,
  drop column limited,
  add constraint offers_have_one_simple_price check (num_nonnulls(flat, unit_price) = 1);
comment on table credits.offers is
  'What plans offer without limits and at a simple price, worked out of the catalogue by _work_out_offers(). A shortcut of check_access(): what is not here is found the general way.';
