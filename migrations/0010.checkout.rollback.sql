set local role credits_owner;
alter type credits.refund_shape drop attribute refund_request_id;
alter type credits.session_shape
  drop attribute checkout_id, drop attribute url, drop attribute expires_at, drop attribute amount_discount,
  drop attribute amount_tax, drop attribute coupons, drop attribute promotion_codes;
drop type credits.stripe_session_result, credits.refund_request_result, credits.purchase_total;
drop table credits.refund_requests, credits.checkouts;
drop index credits.purchases_by_number, credits.purchases_by_completion;
alter table credits.purchases
  drop column amount_subtotal, drop column amount_discount, drop column amount_tax, drop column coupons,
  drop column promotion_codes;
