-- What a notification says: the JSON of a webhook, and the words of an e-mail. A text may name values in braces: those of the
-- notification's data, and those that _text_values() makes.

insert into credits.settings as s (name, value, summary) values
  ('product_name', '"Your credits"', 'How e-mails are signed.')
on conflict (name) do update set summary = excluded.summary;

with listed (kind, subject, body) as (values
  ('low_balance', 'Your credits are running low',
   'You have {balance} credits left, less than the {threshold} at which you wanted to know.'),
  ('credits_expiring', '{amount} of your credits end on {end}',
   '{amount} of your credits can be used until {end}. After that they are gone.'),
  ('purchase_receipt', 'Receipt: {credits} credits for {money}',
   'Thank you. You bought {credits} credits ({package}) for {money}, and they are in your account now. '
   'This is purchase {purchase_id}.'),
  ('payment_failed', 'Your payment of {money} failed',
   'Your bank did not let the payment of {money} for {credits} credits pass, so they are not in your account. '
   'You have not been charged. You can buy them again at any time.'),
  ('refund', 'You get {money} back',
   'We gave {money} back to the card or account that you paid with. It is there within some days.'),
  ('top_up_done', 'Your credits were topped up',
   'Your balance was low, so it was topped up as you asked, and the credits are in your account.'),
  ('top_up_failed', 'Your credits could not be topped up',
   'Your balance is low, and the payment for a top-up did not pass. Please check your card; until then you can use what is left.'),
  ('top_up_action_required', 'Your bank wants you to confirm a payment',
   'Your balance is low, and your bank wants you to confirm the payment for a top-up. Please sign in and confirm it.'),
  ('top_up_paused', 'Your automatic top-up is paused',
   'Your credits are not topped up any more ({reason}). Please check your card, or buy credits yourself.'),
  ('top_up_refused', 'Your credits were not topped up',
   'Your balance is low, but a top-up is not possible now ({reason}). You can buy credits yourself at any time.'),
  ('invoice_payment_failed', 'Your payment of {money} failed',
   'The payment of {money} for your plan did not pass. We try again in the coming days. Please check your card.'),
  ('invoice_payment_action_required', 'Your bank wants you to confirm a payment',
   'Your bank wants you to confirm the payment of {money} for your plan. Please sign in and confirm it.'),
  ('invoice_overdue', 'Your invoice of {money} is overdue',
   'Your invoice of {money} for your plan was not paid in time. Please pay it, so that your plan goes on.')
), kept as (
  insert into credits.notification_texts as t (kind, subject, body)
  select l.kind, l.subject, l.body from listed l
  on conflict (kind) do update set subject = excluded.subject, body = excluded.body
)
delete from credits.notification_texts t where t.kind not in (select l.kind from listed l);

-- All that a worker needs to send it, or null: its endpoint is gone, or its target hears of other things now. Without an address
-- it cannot be sent.
create or replace function credits._compose(delivery credits.notification_deliveries)
returns credits.claimed_delivery
language plpgsql
stable
as $$
declare
  v_delivery credits.notification_deliveries := _compose.delivery;
  v_told     credits.notifications;
  v_message  credits.claimed_delivery;
begin
  select n.* into v_told from credits.notifications n where n.notification_id = v_delivery.notification_id;
  if not credits._is_heard(v_delivery, v_told) then
    return null;
  end if;
  v_message.delivery_id  := v_delivery.delivery_id;
  v_message.attempt      := v_delivery.attempts;
  v_message.channel      := v_delivery.channel;
  v_message.target       := v_delivery.target;
  v_message.locked_until := v_delivery.locked_until;
  v_message.message_id   := credits._message_id(v_told.notification_id);
  if v_delivery.channel = 'webhook' then
    select e.url into v_message.address from credits.notification_endpoints e where e.name = v_delivery.target;
    v_message.body := credits._webhook_body(v_told);
  else
    v_message.address := credits._mail_address(v_told.account_id, v_delivery.target);
    select t.subject, t.body into v_message.subject, v_message.body
      from credits._mail_text(v_told, v_delivery.target) t;
  end if;
  return v_message;
end $$;

create or replace function credits._message_id(notification_id bigint)
returns text
language sql
immutable
as $$
  select 'ntf_' || _message_id.notification_id
$$;

create or replace function credits._webhook_body(notification credits.notifications)
returns text
language sql
immutable
as $$
  select jsonb_build_object(
           'type', n.type, 'timestamp', to_char(n.created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
           'id', credits._message_id(n.notification_id), 'account_id', n.account_id, 'key', n.key, 'data', n.data)::text
    from (select (_webhook_body.notification).*) n
$$;

-- As its target is now: asked before each time it is sent, and when it is replayed.
create or replace function credits._is_heard(
  delivery     credits.notification_deliveries,
  notification credits.notifications
)
returns boolean
language sql
stable
as $$
  select case (_is_heard.delivery).channel
    when 'email' then credits._is_mailed((_is_heard.delivery).target, (_is_heard.notification).type)
    else exists (select from credits.notification_endpoints e
                  where e.name = (_is_heard.delivery).target and credits._hears(e, _is_heard.notification)) end
$$;

-- Whether there are e-mails of a kind.
create or replace function credits._is_mailed(
  target text,
  kind   text
)
returns boolean
language sql
stable
as $$
  select case _is_mailed.target
    when 'customer' then s.customer = 'true' or s.customer ? _is_mailed.kind
    else s.operator <> '""' end
    from (select credits._setting('customer_email') as customer, credits._setting('operator_email') as operator) s
$$;

create or replace function credits._mail_address(
  account_id text,
  target     text
)
returns text
language sql
stable
as $$
  select m.address
    from (select case _mail_address.target
                   when 'operator' then credits._setting('operator_email') #>> '{}'
                   else (select a.email from credits.accounts a where a.account_id = _mail_address.account_id) end) m (address)
   where credits._is_mail_address(m.address)
$$;

-- One address, and nothing that a mail server could take for two or for another, or a program for a word in another writing
-- (=?...?=).
create or replace function credits._is_mail_address(address text)
returns boolean
language sql
immutable
as $$
  select _is_mail_address.address !~ E'[[:space:][:cntrl:]<>(),:;"\\\\\\[\\]]|=[?]'
         and _is_mail_address.address ~ '^[^@]+@[^@.]+([.][^@.]+)*$'
$$;

-- Kinds for customers have words of their own; an operator gets the facts.
create or replace function credits._mail_text(
  notification credits.notifications,
  target       text
)
returns credits.notification_texts
language plpgsql
stable
as $$
declare
  v_told   credits.notifications := _mail_text.notification;
  v_values jsonb := credits._text_values(v_told);
  v_text   credits.notification_texts;
begin
  select t.* into v_text from credits.notification_texts t where t.kind = v_told.type and _mail_text.target = 'customer';
  if not found then
    v_text.subject := 'pgcredits: {kind}{of}';
  end if;
  v_text.subject := left(regexp_replace(credits._fill(v_text.subject, v_values), '[[:space:][:cntrl:]]+', ' ', 'g'), 200);
  v_text.body    := coalesce(credits._fill(v_text.body, v_values),
                             (v_values ->> 'summary') || E'\n\n' || jsonb_pretty(v_told.data))
                    || E'\n\n-- \n' || (v_values ->> 'product') || E'\n';
  return v_text;
end $$;

create or replace function credits._text_values(notification credits.notifications)
returns jsonb
language sql
stable
as $$
  select n.data || jsonb_build_object(
           'kind', n.type, 'of', coalesce(' of ' || n.account_id, ''), 'product', credits._setting('product_name') #>> '{}',
           'summary', coalesce((select k.summary from credits.notification_kinds k where k.kind = n.type), n.type),
           'money', credits._money((n.data ->> 'amount')::numeric, n.data ->> 'currency'),
           'end', to_char((n.data ->> 'expires_at')::timestamptz at time zone coalesce(
                    (select a.time_zone from credits.accounts a where a.account_id = n.account_id), 'UTC'), 'FMDD FMMonth YYYY'))
    from (select (_text_values.notification).*) n
$$;

-- Stripe's minor units: none for these currencies, three digits for those, two for all others.
create or replace function credits._money(
  amount   numeric,
  currency text
)
returns text
language sql
immutable
as $$
  select to_char(_money.amount / 10 ^ d.digits, case d.digits when 0 then 'FM999999999999990' when 3 then 'FM999999999990.000'
                                                              else 'FM999999999990.00' end)
         || ' ' || upper(_money.currency)
    from (select case when _money.currency in ('bif', 'clp', 'djf', 'gnf', 'jpy', 'kmf', 'krw', 'mga', 'pyg', 'rwf', 'vnd', 'vuv',
                                               'xaf', 'xof', 'xpf') then 0
                      when _money.currency in ('bhd', 'jod', 'kwd', 'omr', 'tnd') then 3
                      else 2 end) d (digits)
$$;

-- In one pass, so that a value is never taken for a name.
create or replace function credits._fill(
  template text,
  names    jsonb
)
returns text
language sql
immutable
as $$
  select string_agg(case when p.place % 2 = 1 then p.part else coalesce(_fill.names ->> p.part, '') end, '' order by p.place)
    from regexp_split_to_table(_fill.template, '[{}]') with ordinality p (part, place)
$$;
