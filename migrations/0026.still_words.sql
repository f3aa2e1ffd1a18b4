-- Since when a subscription of Stripe stands still, whatever the order in which its words come. Of the past the last word is
-- known.
set local role credits_owner;

alter table credits.subscriptions
  add still_words  timestamptz[] not null default '{}',
  add receiving_at timestamptz;
comment on column credits.subscriptions.still_words is
  'The moments since receiving_at at which Stripe said what lets nothing be received: no month begins after the first of them.';
comment on column credits.subscriptions.receiving_at is 'The last moment at which Stripe said that credits may be received.';

update credits.subscriptions s
   set still_words  = case when not t.may_receive or s.collection_paused then array[coalesce(to_timestamp(o.as_of), '-infinity')]
                           else '{}' end,
       receiving_at = case when t.may_receive and not s.collection_paused then to_timestamp(o.as_of) end
  from credits.subscriptions u
  join credits.subscription_states t on t.state = u.state
  left join credits.stripe_objects o on o.kind = 'subscription' and o.object_id = u.subscription_id
 where u.source = 'stripe' and s.account_id = u.account_id and s.subscription_id = u.subscription_id;
