-- Who a token speaks for: the issuers that are trusted, and the accounts that each subject of theirs may act for.
set local role credits_owner;

create table credits.issuers (
  issuer          text        primary key,
  audiences       text[]      not null default '{}',
  require_aud     boolean     not null default true,
  org_claim       text[],
  allow_anonymous boolean     not null default false,
  created_at      timestamptz not null,
  constraint issuers_name_is_short check (issuer <> '' and length(issuer) <= 255),
  constraint issuers_require_what_they_name check (not require_aud or cardinality(audiences) > 0),
  constraint issuers_org_claim_is_a_path check (cardinality(org_claim) > 0)
);
comment on table credits.issuers is
  'Whose tokens count: what a token says in iss. Tokens of anybody else belong to no account, however they are signed.';
comment on column credits.issuers.audiences is 'A token must be meant for one of these (its aud), unless require_aud is false.';
comment on column credits.issuers.org_claim is
  'Where a token names the organisation that its bearer acts for: {org_id}, or a path such as {o,id}. Null is nowhere.';
comment on column credits.issuers.allow_anonymous is
  'Whether tokens with is_anonymous count. Who gives credits to anonymous users gives them to everybody, again and again.';

-- An organisation and a user of one issuer may have the same id: kind keeps the two apart.
create table credits.identities (
  issuer     text        not null references credits.issuers,
  kind       text        not null,
  subject    text        not null,
  account_id text        not null references credits.accounts,
  may_buy    boolean     not null,
  created_at timestamptz not null,
  primary key (issuer, kind, subject, account_id),
  constraint identities_kind_is_known check (kind in ('user', 'org')),
  constraint identities_subject_is_short check (subject <> '' and length(subject) <= 255)
);
create index identities_by_account on credits.identities (account_id);
comment on table credits.identities is
  'Which accounts the bearer of a token may see: those of its subject (kind user) and of its organisation (kind org).';
comment on column credits.identities.may_buy is 'Whether it may start a checkout and open the portal, too.';

create table credits.enabled_roles (
  role text primary key,
  kind text not null,
  constraint enabled_roles_kind_is_known check (kind in ('user', 'service'))
);
comment on table credits.enabled_roles is
  'Roles of a platform that have the rights of credits_user or credits_service. Every deploy grants them anew.';

create type credits.subject as (issuer text, kind text, subject text);
create type credits.free_credits as (
  account_id text, grant_id bigint, kind text, amount numeric, remaining numeric, held numeric, effective_at timestamptz,
  expires_at timestamptz, scope text[], description text, created_at timestamptz);

alter table credits.issuers enable row level security;
alter table credits.identities enable row level security;
alter table credits.enabled_roles enable row level security;

-- PostgREST takes over the settings of a role, but only those for the whole cluster: another database may have set them, or be
-- about to.
reset role;
do $$
declare
  v_set record;
begin
  for v_set in
    select t.role, t.name, t.value
      from (values ('credits_user',    'statement_timeout', '8s'),
                   ('credits_user',    'lock_timeout',      '4s'),
                   ('credits_service', 'statement_timeout', '60s')) t (role, name, value)
      join pg_catalog.pg_roles r on r.rolname = t.role
     where (t.name || '=' || t.value = any (r.rolconfig)) is not true
  loop
    execute format('alter role %I set %I = %L', v_set.role, v_set.name, v_set.value);
  end loop;
exception when insufficient_privilege or internal_error then  -- the latter: "tuple concurrently updated"
  raise notice 'the timeouts of the roles are not set: %', sqlerrm;
end $$;
