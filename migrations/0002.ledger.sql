-- The ledger: accounts, their balances, the lots of credits (grants), and the append-only entries.
-- Lock order everywhere: the account's balances row first (several accounts: by account_id), then its grants in
-- consumption order, then whatever else belongs to the account.
set local role credits_owner;

-- Rules of single columns of hot tables are domains: the server keeps those compiled, while it reads the CHECKs of a
-- table anew for every statement, which was measured to cost a third of a spend.
create domain credits.amount as numeric
  constraint amount_is_positive_with_6_decimals check (value > 0 and value < 1e12 and value = round(value, 6));
create domain credits.part as numeric
  constraint part_is_not_negative check (value >= 0);
create domain credits.grant_kind as text
  constraint grant_kind_is_known check (value in ('plan', 'trial', 'promo', 'bonus', 'gift', 'purchase'));
create domain credits.grant_status as text
  constraint grant_status_is_known check (value in ('pending', 'active', 'exhausted', 'expired', 'revoked'));
create domain credits.reservation_status as text
  constraint reservation_status_is_known check (value in ('open', 'settled', 'released', 'expired'));

-- Who ---------------------------------------------------------------------------------------------------------------

create table credits.plans (
  code            text        primary key,
  name            text        not null,
  description     text,
  monthly_credits numeric     not null default 0,
  active          boolean     not null default true,
  created_at      timestamptz not null default clock_timestamp(),
  constraint plans_code_is_short check (code <> '' and length(code) <= 200),
  constraint plans_monthly_credits_is_an_amount check (
    monthly_credits >= 0 and monthly_credits < 1e12 and monthly_credits = round(monthly_credits, 6))
);
comment on table credits.plans is 'What a customer subscribes to, and the credits that it allots a month.';
comment on column credits.plans.monthly_credits is 'Credits granted for each month, as a grant of kind plan.';

create table credits.accounts (
  account_id  text        primary key,
  kind        text        not null default 'user',
  status      text        not null default 'active',
  plan        text        references credits.plans (code),
  email       text,
  debt_limit  numeric     not null default 0,
  settings    jsonb       not null default '{}',
  metadata    jsonb       not null default '{}',
  fingerprint jsonb       not null default '{}',
  created_at  timestamptz not null default clock_timestamp(),
  constraint accounts_id_is_short check (account_id <> '' and length(account_id) <= 200),
  constraint accounts_kind_is_known check (kind in ('user', 'organization')),
  constraint accounts_status_is_known check (status in ('active', 'frozen', 'closed')),
  constraint accounts_debt_limit_is_an_amount check (
    debt_limit >= 0 and debt_limit < 1e12 and debt_limit = round(debt_limit, 6)),
  constraint accounts_settings_is_an_object check (jsonb_typeof(settings) = 'object'),
  constraint accounts_metadata_is_an_object check (jsonb_typeof(metadata) = 'object')
);
comment on table credits.accounts is
  'Who owns credits. account_id is the key that the product itself uses: a user or an organisation.';
comment on column credits.accounts.account_id is
  'At most 200 characters: Stripe returns it to us as client_reference_id, which is no longer than that.';
comment on column credits.accounts.debt_limit is
  'Credits that settle(on_overage => ''overflow'') may charge beyond the available ones.';
comment on column credits.accounts.fingerprint is 'The arguments of the call that opened the account.';

create table credits.members (
  account_id    text        not null references credits.accounts,
  member_id     text        not null,
  role          text        not null default 'member',
  monthly_limit numeric,
  created_at    timestamptz not null default clock_timestamp(),
  primary key (account_id, member_id),
  constraint members_id_is_short check (member_id <> '' and length(member_id) <= 200),
  constraint members_role_is_known check (role in ('owner', 'admin', 'member')),
  constraint members_limit_is_an_amount check (
    monthly_limit >= 0 and monthly_limit < 1e12 and monthly_limit = round(monthly_limit, 6))
);
comment on table credits.members is 'People inside an organisation''s account.';
comment on column credits.members.monthly_limit is 'Credits that the member may use in a month; null is no limit.';

-- How much ----------------------------------------------------------------------------------------------------------

-- Narrow, and without a second index: every movement of credits updates its row in place (a HOT update).
create table credits.balances (
  entry_seq   bigint      not null default 0,
  next_due_at timestamptz not null default 'infinity',
  account_id  text        primary key references credits.accounts,
  balance     credits.part not null default 0,
  held        credits.part not null default 0,
  debt        credits.part not null default 0,
  hash        bytea       not null,
  constraint balances_cover_what_is_held check (balance >= held)
) with (fillfactor = 50);
comment on table credits.balances is
  'How much: one narrow row per account, and the lock of the account. available = balance - held - debt - what is scoped to capabilities.';
comment on column credits.balances.entry_seq is 'Number of the account''s last entry.';
comment on column credits.balances.next_due_at is
  'Nothing falls due before this moment: no grant starts or ends, no reservation runs out. It may be early, never late.';
comment on column credits.balances.balance is 'Credits that are effective and not expired, held ones included.';
comment on column credits.balances.held is 'The part of balance that open reservations pin.';
comment on column credits.balances.debt is 'What a clawback or an overage could not take. The next credits pay it first.';
comment on column credits.balances.hash is 'Hash of the account''s last entry; see entries.hash.';

create table credits.grants (
  grant_id      bigint      generated always as identity,
  effective_at  timestamptz not null,
  expires_at    timestamptz,
  created_at    timestamptz not null,
  priority      integer     not null,
  account_id    text        not null references credits.accounts,
  kind          credits.grant_kind   not null,
  amount        credits.amount       not null,
  status        credits.grant_status not null,
  remaining     credits.part         not null,
  held          credits.part         not null default 0,
  consumed      credits.part         not null default 0,
  expired       credits.part         not null default 0,
  revoked       credits.part         not null default 0,
  owed          credits.part         not null default 0,
  scope         text[],
  source        text,
  cost          bigint,
  cost_currency text,
  description   text,
  key           text,
  fingerprint   jsonb,
  metadata      jsonb       not null default '{}',
  primary key (account_id, grant_id),
  constraint grants_one_per_key unique (account_id, key),
  constraint grants_parts_sum_to_amount check (amount = remaining + held + consumed + expired + revoked)
) with (fillfactor = 70);

-- Status changes once or twice in the life of a grant, so this index does not stop HOT updates of its amounts.
create index grants_live on credits.grants (account_id, priority, expires_at, effective_at, grant_id)
  where status in ('pending', 'active');

comment on table credits.grants is
  'Lots of credits. Spent in the order priority, expires_at (nulls last), effective_at, grant_id; usable in [effective_at, expires_at).';
comment on column credits.grants.amount is 'Always remaining + held + consumed + expired + revoked.';
comment on column credits.grants.status is
  'pending until effective_at; active while anything remains or is held; then exhausted, expired or revoked by what ended it.';
comment on column credits.grants.owed is
  'The part that a clawback turned into debt because it was spent or held. Not a part of amount: it bounds further clawbacks.';
comment on column credits.grants.scope is 'Capabilities that these credits pay for; null is all of them.';
comment on column credits.grants.source is 'What made the grant, such as checkout:cs_1 or transfer:<account>.';
comment on column credits.grants.cost is 'What was paid for the grant, in the minor unit of cost_currency.';

create table credits.entry_kinds (
  kind    text primary key,
  debit   text not null,
  credit  text not null,
  summary text not null,
  constraint entry_kinds_touch_the_customer check (
    'customer_credits' in (debit, credit) or 'customer_debt' in (debit, credit)),
  constraint entry_kinds_have_two_sides check (debit <> credit)
);
comment on table credits.entry_kinds is
  'The chart of accounts: the ledger account that each kind of entry debits and the one that it credits.';

-- No foreign keys: every entry would have to lock the rows it points to, and the few rows of entry_kinds would be a
-- bottleneck of the whole database. audit() finds strays.
create table credits.entries (
  entry_seq       bigint      not null,
  created_at      timestamptz not null,
  account_id      text        not null,
  kind            text        not null,
  operation       text        not null,
  key             text,
  amount          numeric     not null,
  debt            numeric     not null default 0,
  balance_after   numeric     not null,
  available_after numeric     not null,
  grant_ids       bigint[]    not null default '{}',
  grant_amounts   numeric[]   not null default '{}',
  hash            bytea       not null,
  reservation_id  text,
  refunds_seq     bigint,
  subject         text,
  member_id       text,
  capability      text,
  description     text,
  fingerprint     jsonb,
  metadata        jsonb       not null default '{}',
  primary key (account_id, entry_seq),
  constraint entries_one_per_key unique (account_id, operation, key)
);
create index entries_refunds on credits.entries (account_id, refunds_seq) where refunds_seq is not null;

comment on table credits.entries is
  'The ledger: append-only, numbered per account from 1 without a gap. Written by credits._post(), and by credits._spend_together() for many at once.';
comment on column credits.entries.amount is 'Signed change of the balance.';
comment on column credits.entries.debt is 'Signed change of the debt.';
comment on column credits.entries.operation is 'The verb that wrote it. Its key is unique per account and operation.';
comment on column credits.entries.key is
  'The idempotency key of the verb; null on the further entries of one operation.';
comment on column credits.entries.grant_ids is 'The grants whose credits moved, beside grant_amounts.';
comment on column credits.entries.refunds_seq is 'entry_seq of the charge that this entry gives back.';
comment on column credits.entries.subject is 'What the credits were used for, in the product''s words: book:42.';
comment on column credits.entries.hash is
  'sha256(hash of entry_seq - 1, then credits._entry_text(entry)); before entry 1 stands sha256(account_id).';

-- What callers get --------------------------------------------------------------------------------------------------

create type credits.account_result as (
  account_id text, kind text, status text, plan text, email text, created_at timestamptz, replayed boolean);
create type credits.balance_result as (
  account_id text, available numeric, held numeric, balance numeric, debt numeric, status text, plan text,
  next_expiry_at timestamptz, next_expiry_amount numeric, by_kind jsonb, scoped jsonb, pending numeric,
  entry_seq bigint);
create type credits.grant_result as (
  grant_id bigint, account_id text, kind text, amount numeric, priority integer, effective_at timestamptz,
  expires_at timestamptz, entry_seq bigint, balance numeric, available numeric, replayed boolean);
create type credits.entry_result as (
  entry_seq bigint, account_id text, amount numeric, debt numeric, balance numeric, available numeric,
  created_at timestamptz, replayed boolean);
create type credits.transfer_result as (
  entry_seq bigint, from_account_id text, to_account_id text, amount numeric, balance numeric, available numeric,
  created_at timestamptz, replayed boolean);
create type credits.spend_many_result as (
  position bigint, account_id text, key text, status integer, code text, detail jsonb, entry_seq bigint,
  amount numeric, balance numeric, available numeric, replayed boolean);
create type credits.history_result as (
  entry_seq bigint, created_at timestamptz, kind text, amount numeric, debt numeric, balance_after numeric,
  available_after numeric, description text, subject text, member_id text, capability text, reservation_id text,
  operation text, key text, grants jsonb, metadata jsonb);
create type credits.proof_result as (
  account_id text, ok boolean, balance numeric, held numeric, debt numeric, entries bigint, entries_sum numeric,
  grants_sum numeric, reservations_sum numeric, hash text, findings jsonb);
create type credits.audit_finding as (
  invariant text, account_id text, detail jsonb);

-- How a set of grants pays for something: what each gives, their sum, and how much of the credits without a scope is
-- left (null = not counted). ended: credits returned to a grant whose time was over.
create type credits.slices as (
  grant_ids bigint[], amounts numeric[], taken numeric, left_free numeric, ended boolean);

-- One request of spend_many, read and checked; simple ones are booked together.
create type credits.spend_request as (
  position bigint, account_id text, amount numeric, description text, subject text, member_id text, capability text,
  key text, metadata jsonb, simple boolean);

-- A grant as it is at some moment, and credits that become free by then with the debt that they pay.
create type credits.lot as (
  grant_id bigint, kind credits.grant_kind, scope text[], expires_at timestamptz, remaining numeric, held numeric);
create type credits.freed_slice as (grant_id bigint, amount numeric, returned boolean, paid numeric);

do $$
declare
  v_table text;
begin
  foreach v_table in array array['plans', 'accounts', 'members', 'balances', 'grants', 'entry_kinds', 'entries'] loop
    execute format('alter table credits.%I enable row level security', v_table);
  end loop;
end $$;
