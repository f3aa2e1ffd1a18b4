-- What answers and events say of a session of Checkout or of the portal that we asked for.

-- What a session of Checkout says of the one that we asked for. The first session stands. Where the account is given, it must
-- be that of the checkout: sessions of others are none of ours.
create or replace function credits._note_checkout(
  session    credits.session_shape,
  account_id text default null
)
returns void
language plpgsql
as $$
declare
  v_session  credits.session_shape := _note_checkout.session;
  v_checkout credits.checkouts;
begin
  select c.* into v_checkout
    from credits.checkouts c
   where c.checkout_id = v_session.checkout_id and c.account_id = coalesce(_note_checkout.account_id, c.account_id);
  if not found then
    return;
  end if;
  perform credits._lock_account(v_checkout.account_id);
  update credits.checkouts c
     set session_id = v_session.session_id,
         status     = case when c.status is null or v_session.status <> 'open' then v_session.status else c.status end,
         url        = coalesce(v_session.url, c.url),
         expires_at = coalesce(v_session.expires_at, c.expires_at)
   where c.checkout_id = v_checkout.checkout_id and coalesce(c.session_id, v_session.session_id) = v_session.session_id;
  if found then
    update credits.purchases p
       set stripe_session_id = v_session.session_id, livemode = coalesce(v_session.livemode, p.livemode)
     where p.account_id = v_checkout.account_id and p.purchase_id = v_checkout.purchase_id and p.stripe_session_id is null;
  end if;
end $$;

-- The purchase that was written when the session was asked for: its price and credits are frozen.
create or replace function credits._purchase_of_checkout(
  session    credits.session_shape,
  account_id text
)
returns credits.purchases
language sql
stable
as $$
  select p.*
    from credits.checkouts c
    join credits.purchases p on p.account_id = c.account_id and p.purchase_id = c.purchase_id
   where c.checkout_id = (_purchase_of_checkout.session).checkout_id and c.account_id = _purchase_of_checkout.account_id
     and coalesce(c.session_id, (_purchase_of_checkout.session).session_id) = (_purchase_of_checkout.session).session_id
$$;

-- A portal session carries nothing of ours and no end: its request names it, and Stripe lets in for five minutes.
create or replace function credits._on_portal_session(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_session credits.session_shape := credits._shape_session((_on_portal_session.notice).object);
begin
  update credits.checkouts c
     set session_id = v_session.session_id,
         status     = 'open',
         url        = v_session.url,
         expires_at = to_timestamp((_on_portal_session.notice).at) + interval '5 minutes'
   where 'request:' || c.request_id = (_on_portal_session.notice).event_id and c.kind = 'portal';
  return credits._applied();
end $$;

-- A request that has failed for good sells nothing. Whoever closes it holds its row, then the account, as answers do.
create or replace function credits._on_failed_checkout(notice credits.stripe_notice)
returns credits.handler_result
language plpgsql
as $$
declare
  v_request credits.stripe_requests := credits._answered(_on_failed_checkout.notice);
begin
  perform credits._lock_account(v_request.account_id);
  update credits.purchases p
     set status = 'failed'
    from credits.checkouts c
   where c.request_id = v_request.request_id and p.account_id = c.account_id and p.purchase_id = c.purchase_id
     and p.status = 'pending' and p.stripe_session_id is null;
  return credits._applied();
end $$;
