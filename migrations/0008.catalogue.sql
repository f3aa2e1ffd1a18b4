-- The catalogue: what each plan may use, at which quality, with which models and how often, and what it costs. What was
-- used, counted window by window, and members with limits.
-- Lock order: the account's balances row first, then its grants, then usages, usage_windows, usage_admissions and members.
set local role credits_owner;

-- What is sold -------------------------------------------------------------------------------------------------------

alter table credits.plans
  add column seats         integer,
  add column display_order integer not null default 0,
  add column is_default    boolean not null default false,
  add constraint plans_seats_are_positive check (seats > 0);
create unique index plans_one_default on credits.plans (is_default) where is_default;
comment on column credits.plans.seats is 'How many members an account on this plan may have; null is no limit.';
comment on column credits.plans.is_default is 'Says what accounts without a plan may use. It gives them no credits.';

create table credits.capabilities (
  code          text        primary key,
  name          text        not null,
  description   text,
  unit          text        not null default 'unit',
  display_order integer     not null default 0,
  active        boolean     not null default true,
  created_at    timestamptz not null default clock_timestamp(),
  constraint capabilities_code_is_short check (code <> '' and length(code) <= 200),
  constraint capabilities_unit_is_short check (unit <> '' and length(unit) <= 200)
);
comment on table credits.capabilities is 'What the product can do for its customers, such as writing a chapter.';
comment on column credits.capabilities.unit is 'What its units are: words, images, seconds.';

create table credits.quality_levels (
  code          text        primary key,
  name          text        not null,
  description   text,
  display_order integer     not null default 0,
  active        boolean     not null default true,
  created_at    timestamptz not null default clock_timestamp(),
  constraint quality_levels_code_is_short check (code <> '' and length(code) <= 200)
);
comment on table credits.quality_levels is 'How well a capability can be served, the lowest first in display_order.';

create table credits.models (
  code          text        primary key,
  name          text        not null,
  description   text,
  display_order integer     not null default 0,
  active        boolean     not null default true,
  created_at    timestamptz not null default clock_timestamp(),
  constraint models_code_is_short check (code <> '' and length(code) <= 200)
);
comment on table credits.models is 'What runs a capability.';

create table credits.plan_capabilities (
  plan       text not null references credits.plans (code),
  capability text not null references credits.capabilities (code),
  primary key (plan, capability)
);
comment on table credits.plan_capabilities is 'Which plan may use what.';

create table credits.plan_qualities (
  plan       text    not null references credits.plans (code),
  capability text,
  quality    text    not null references credits.quality_levels (code),
  model      text    references credits.models (code),
  rank       integer not null default 0,
  constraint plan_qualities_list_a_model_once unique nulls not distinct (plan, capability, quality, model),
  foreign key (plan, capability) references credits.plan_capabilities (plan, capability) on delete cascade
);
comment on table credits.plan_qualities is
  'At which quality a plan may use a capability, and the models that run it, the best one first.';
comment on column credits.plan_qualities.capability is 'Null is every capability of the plan that has no rows of its own.';
comment on column credits.plan_qualities.model is 'Null where no model is asked for.';

create table credits.plan_limits (
  plan       text    not null references credits.plans (code),
  capability text,
  measure    text    not null,
  period     text    not null,
  rolling    boolean not null default false,
  maximum    numeric not null,
  span       interval not null generated always as (
               case period when 'minute' then interval '1 minute' when 'hour' then interval '1 hour'
                           when 'day' then interval '1 day' else interval '30 days' end) stored,
  constraint plan_limits_one_per_window unique nulls not distinct (plan, capability, measure, period, rolling),
  foreign key (plan, capability) references credits.plan_capabilities (plan, capability) on delete cascade,
  constraint plan_limits_measure_is_known check (measure in ('calls', 'units', 'credits')),
  constraint plan_limits_period_is_known check (period in ('minute', 'hour', 'day', 'month')),
  constraint plan_limits_roll_by_calls check (measure = 'calls' or not rolling),
  constraint plan_limits_cap_a_month check (measure = 'calls' or period = 'month'),
  constraint plan_limits_count_units_of_one_capability check (measure <> 'units' or capability is not null),
  constraint plan_limits_maximum_is_an_amount check (maximum >= 0 and maximum < 1e12 and maximum = round(maximum, 6)),
  constraint plan_limits_calls_are_whole check (measure <> 'calls' or maximum = trunc(maximum))
);
comment on table credits.plan_limits is 'Rate limits (calls per window) and monthly caps (units or credits) of a plan.';
comment on column credits.plan_limits.capability is 'Null counts all capabilities together.';
comment on column credits.plan_limits.span is 'How long a rolling window is.';
comment on column credits.plan_limits.rolling is
  'Whether the window is the time just before each call; else it is a minute, hour, day or month of the account''s calendar.';

create table credits.rates (
  rate_id     bigint      generated always as identity primary key,
  capability  text        not null references credits.capabilities (code),
  quality     text        references credits.quality_levels (code),
  model       text        references credits.models (code),
  valid_from  timestamptz not null default '-infinity',
  valid_until timestamptz not null default 'infinity',
  price       jsonb       not null,
  created_at  timestamptz not null default clock_timestamp(),
  constraint rates_one_per_start unique nulls not distinct (capability, quality, model, valid_from),
  constraint rates_price_is_an_object check (jsonb_typeof(price) = 'object')
);
comment on table credits.rates is
  'What a capability costs, in credits. A rate that has been in force is never edited: a new one follows it.';
comment on column credits.rates.quality is 'Null is every quality without a rate of its own.';
comment on column credits.rates.model is 'Null is every model without a rate of its own.';
comment on column credits.rates.valid_from is 'In force from here until the next rate of the same capability, quality and model.';
comment on column credits.rates.valid_until is 'When it left the catalogue.';
comment on column credits.rates.price is 'The price, as the catalogue document says it, in full: see docs/prices.md.';

-- A look at access is mostly answered by one row of these and the account's own.
create table credits.offers (
  plan          text    not null,
  capability    text    not null,
  asked_quality text    not null,
  asked_model   text    not null,
  offered_by    text    not null,
  quality       text,
  model         text,
  flat          numeric,
  unit_price    numeric,
  rate_id       bigint  not null,
  valid_until   timestamptz not null,
  primary key (plan, capability, asked_quality, asked_model),
  constraint offers_have_one_simple_price check (num_nonnulls(flat, unit_price) = 1)
);
comment on table credits.offers is
  'What plans offer without limits and at a simple price, worked out of the catalogue by _work_out_offers(). A shortcut of check_access(): what is not here is found the general way.';
comment on column credits.offers.plan is 'Empty for accounts without a plan, who have the offers of the default one.';
comment on column credits.offers.asked_quality is 'Empty if the call names none; asked_model likewise.';
comment on column credits.offers.flat is 'Credits of a call, however many units.';
comment on column credits.offers.unit_price is 'Credits of a unit; the sum is rounded half up to 6 decimals.';
comment on column credits.offers.valid_until is 'When another rate comes into force.';
alter table credits.balances add column plan text default '';
update credits.balances b
   set plan = case when not exists (select from credits.subscriptions s
                                      join credits.subscription_states t on t.state = s.state
                                     where s.account_id = a.account_id and not t.may_receive and not t.terminal)
                   then coalesce(a.plan, '') end
  from credits.accounts a
 where a.account_id = b.account_id;
comment on column credits.balances.plan is
  'The plan whose offers the account has, here for whoever looks; empty if it has none, null if its subscription must be asked first.';

-- What is used -------------------------------------------------------------------------------------------------------

create table credits.usages (
  authorized_at   timestamptz    not null,
  closed_at       timestamptz,
  account_id      text           not null references credits.accounts,
  usage_id        text           not null,
  status          credits.reservation_status not null default 'open',
  capability      text           not null,
  quality         text,
  model           text,
  plan            text,
  rate_id         bigint         not null,
  counts          jsonb          not null,
  units           numeric        not null,
  amount          credits.part   not null,
  counted_in      text[]         not null,
  counted_units   numeric        not null,
  counted_credits numeric        not null,
  fingerprint     jsonb          not null,
  result          jsonb          not null,
  closing         jsonb,
  primary key (account_id, usage_id)
) with (fillfactor = 70);
comment on table credits.usages is
  'Uses of capabilities, from authorize_usage() on: what they pinned, and what became of them. Their credits are held by the reservation of the same id.';
comment on column credits.usages.counts is 'What was announced, then what was used: units by name.';
comment on column credits.usages.units is 'The same, of the capability''s own unit.';
comment on column credits.usages.amount is 'The price of what was announced; what was held.';
comment on column credits.usages.counted_in is 'The windows that counted it: capability/period, capability/rolling; all capabilities without a name.';
comment on column credits.usages.counted_units is 'What those windows count for it: what was announced, then what was used.';
comment on column credits.usages.counted_credits is 'The same in credits: what is held, then what was charged.';
comment on column credits.usages.result is 'The first answer of authorize_usage().';
comment on column credits.usages.closing is 'The arguments of settle_usage(), and its first answer.';

-- One row per window, written over when the next one begins: it never grows, and every count is a HOT update.
create table credits.usage_windows (
  account_id   text        not null references credits.accounts,
  capability   text        not null,
  period       text        not null,
  window_start timestamptz not null,
  calls        bigint      not null default 0,
  units        numeric     not null default 0,
  credits      numeric     not null default 0,
  primary key (account_id, capability, period)
) with (fillfactor = 50);
comment on table credits.usage_windows is
  'What was used in the present window of each limit: open usages and settled ones, in the window in which they were authorized.';
comment on column credits.usage_windows.capability is 'Empty counts all capabilities together.';

-- Numbered without a gap, so that how many are in a window is a difference of two numbers, not a count.
create table credits.usage_admissions (
  account_id  text        not null references credits.accounts,
  capability  text        not null,
  admitted_at timestamptz not null,
  number      bigint      not null,
  primary key (account_id, capability, admitted_at, number)
);
comment on table credits.usage_admissions is 'When the calls that rolling limits count were admitted.';
comment on column credits.usage_admissions.capability is 'Empty counts all capabilities together.';

-- What costs nothing is a usage too, and holds nothing.
alter table credits.reservations
  alter column requested type credits.part,
  alter column amount    type credits.part,
  add column counted boolean not null default false;
comment on column credits.reservations.counted is 'Whether a usage or the limit of a member counts it, and must hear of its end.';

alter table credits.members
  add column active      boolean     not null default true,
  add column month_start timestamptz not null default '-infinity',
  add column month_used  numeric     not null default 0;
comment on column credits.members.active is 'Whether the member may use credits; rows stay, so that a limit is not forgotten.';
comment on column credits.members.month_used is 'Credits used or held in the month of month_start, in the account''s time zone.';

create index subscriptions_by_turn on credits.subscriptions (period_end) where source = 'internal';

-- What callers get ---------------------------------------------------------------------------------------------------

create type credits.catalog_change as (change text, path text, before jsonb, after jsonb);
create type credits.catalog_problem as (path jsonb, problem text);
create type credits.quote_result as (
  account_id text, capability text, quality text, model text, units numeric, unit_counts jsonb, amount numeric,
  rate_id bigint, valid_from timestamptz, explanation jsonb);
create type credits.access_result as (
  account_id text, allowed boolean, gate text, status integer, code text, capability text, quality text, model text,
  plan text, amount numeric, available numeric, rate_id bigint, detail jsonb, limits jsonb);
create type credits.usage_result as (
  usage_id text, account_id text, status text, capability text, quality text, model text, amount numeric,
  rate_id bigint, expires_at timestamptz, available numeric, replayed boolean);
create type credits.settle_usage_result as (
  usage_id text, account_id text, status text, capability text, quality text, model text, units numeric,
  unit_counts jsonb, actual numeric, charged numeric, uncollected numeric, released numeric, late boolean,
  rate_id bigint, explanation jsonb, entry_seq bigint, balance numeric, available numeric, replayed boolean);
create type credits.limit_result as (
  gate text, capability text, member_id text, measure text, period text, rolling boolean, maximum numeric, used numeric,
  "left" numeric, resets_at timestamptz);
create type credits.usage_summary as (name text, credits numeric, held numeric, uses bigint);
create type credits.member_result as (
  account_id text, member_id text, role text, monthly_limit numeric, used numeric, active boolean, created_at timestamptz);

-- How a price comes about; what a use asks for, and all that was decided about it: the gate that refuses, or none.
create type credits.priced as (amount numeric, explanation jsonb);
create type credits.use_request as (
  capability text, units numeric, unit_counts jsonb, quality text, model text, member_id text, rate_id bigint);
create type credits.usage_move as (
  at timestamptz, subject text, capability text, member_id text, reservation_id text, credits numeric, held numeric, use text);
create type credits.window_use as (used numeric, resets_at timestamptz);
create type credits.askable as (plan text, capability text, unit text, quality text, model text);
create type credits.simple_price as (flat numeric, unit_price numeric);
create type credits.plan_choice as (quality text, model text, listed boolean);
create type credits.use as (
  account_id text, kind text, time_zone text, plan text, capability text, unit text, quality text, model text, member_id text,
  counts jsonb, units numeric, rate_id bigint, amount numeric, available numeric, limits jsonb,
  gate text, status integer, code text, detail jsonb);

do $$
declare
  v_table text;
begin
  foreach v_table in array array['capabilities', 'quality_levels', 'models', 'plan_capabilities', 'plan_qualities',
                                 'plan_limits', 'rates', 'offers', 'usages', 'usage_windows', 'usage_admissions'] loop
    execute format('alter table credits.%I enable row level security', v_table);
  end loop;
end $$;
