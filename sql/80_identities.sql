-- Who is asking: the issuers that are trusted, whom their tokens name, and the accounts of these.
-- Keeps: an account id that comes from a browser is a request, never a right.

create or replace function credits.set_issuer(
  issuer          text,
  audiences       text[]  default null,
  require_aud     boolean default null,
  org_claim       text[]  default null,
  allow_anonymous boolean default null
)
returns credits.issuers
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_issuer credits.issuers;
  v_bad    text := case
    when array_ndims(set_issuer.audiences) > 1
         or array_position(set_issuer.audiences, null) is not null or '' = any (set_issuer.audiences) then 'audiences'
    when coalesce(set_issuer.require_aud, true) and coalesce(cardinality(set_issuer.audiences), 0) = 0 then 'audiences'
    when array_ndims(set_issuer.org_claim) > 1 or cardinality(set_issuer.org_claim) = 0
         or array_position(set_issuer.org_claim, null) is not null then 'org_claim' end;
begin
  perform credits._check_key(set_issuer.issuer, 'issuer');
  if v_bad is not null then
    perform credits._fail(400, 'invalid_request', jsonb_build_object('argument', v_bad), case v_bad
      when 'audiences' then 'Name the aud of the tokens that are meant for you, or say require_aud => false.'
      else 'org_claim is the path to a claim, such as {o,id}.' end);
  end if;
  insert into credits.issuers as i (issuer, audiences, require_aud, org_claim, allow_anonymous, created_at)
  values (set_issuer.issuer, coalesce(set_issuer.audiences, '{}'), coalesce(set_issuer.require_aud, true),
          set_issuer.org_claim, coalesce(set_issuer.allow_anonymous, false), credits.now())
  on conflict on constraint issuers_pkey do update
     set audiences       = excluded.audiences,
         require_aud     = excluded.require_aud,
         org_claim       = excluded.org_claim,
         allow_anonymous = excluded.allow_anonymous
  returning i.* into v_issuer;
  return v_issuer;
end $$;
comment on function credits.set_issuer(text, text[], boolean, text[], boolean) is
'Trusts the tokens of an issuer, or changes how. States all of it: what is not given is the default again.

issuer is what its tokens say in iss, letter by letter. A token must be meant for one of audiences (aud); only
require_aud => false lets others pass. org_claim is the path to the claim that names the bearer''s organisation, {org_id} or
{o,id}; by default tokens speak for users alone. Tokens with is_anonymous count only if allow_anonymous is true. Whoever takes
the token checks its signature; this says which of those that are signed count.
Errors: 400 invalid_request.';

create or replace function credits.remove_issuer(issuer text)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_links integer;
begin
  perform credits._check_key(remove_issuer.issuer, 'issuer');
  perform from credits.issuers i where i.issuer = remove_issuer.issuer for update;  -- nobody links meanwhile
  delete from credits.identities i where i.issuer = remove_issuer.issuer;
  get diagnostics v_links = row_count;
  delete from credits.issuers i where i.issuer = remove_issuer.issuer;
  return v_links;
end $$;
comment on function credits.remove_issuer(text) is
'Trusts an issuer no more, at once, and forgets who was linked by it: returns how many links that were.

Removing one that is not there changes nothing.
Errors: 400 invalid_request.';

create or replace function credits.link_identity(
  account_id text,
  issuer     text,
  subject    text,
  kind       text    default 'user',
  may_buy    boolean default null
)
returns credits.identities
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kind     text := credits._check_identity(link_identity.issuer, link_identity.subject, link_identity.kind);
  v_identity credits.identities;
begin
  perform credits._account(link_identity.account_id);
  perform from credits.issuers i where i.issuer = link_identity.issuer for key share;
  if not found then
    perform credits._fail(404, 'issuer_not_found', jsonb_build_object('issuer', link_identity.issuer),
      'Trust it first: credits.set_issuer(issuer, audiences).');
  end if;
  insert into credits.identities as i (issuer, kind, subject, account_id, may_buy, created_at)
  values (link_identity.issuer, v_kind, link_identity.subject, link_identity.account_id,
          coalesce(link_identity.may_buy, v_kind = 'user'), credits.now())
  on conflict on constraint identities_pkey do update set may_buy = excluded.may_buy
  returning i.* into v_identity;
  return v_identity;
end $$;
comment on function credits.link_identity(text, text, text, text, boolean) is
'Lets the bearer of an issuer''s tokens see an account: the user sub, or whoever acts for the organisation in org_claim.

kind is user or org: an organisation''s id is never taken for a user''s. A subject may be linked to several accounts, an
account to several subjects. may_buy lets it start checkouts and open the portal, too: by default users may; organisations,
which are all of their members, may not. The same call again changes nothing but may_buy.
Errors: 400 invalid_request, 404 account_not_found, issuer_not_found.';

create or replace function credits.unlink_identity(
  account_id text,
  issuer     text,
  subject    text,
  kind       text default 'user'
)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_kind text := credits._check_identity(unlink_identity.issuer, unlink_identity.subject, unlink_identity.kind);
begin
  perform credits._account(unlink_identity.account_id);
  delete from credits.identities i
   where i.account_id = unlink_identity.account_id and i.issuer = unlink_identity.issuer
     and i.subject = unlink_identity.subject and i.kind = v_kind;
  return found;
end $$;
comment on function credits.unlink_identity(text, text, text, text) is
'Takes a link away, at once, tokens that are still valid included. Returns whether there was one.
Errors: 400 invalid_request, 404 account_not_found.';

create or replace function credits.list_identities(account_id text)
returns setof credits.identities
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform credits._account(list_identities.account_id);
  return query
    select i.*
      from credits.identities i
     where i.account_id = list_identities.account_id
     order by i.created_at, i.issuer, i.kind, i.subject;
end $$;
comment on function credits.list_identities(text) is
'Who may see an account by a token, the first linked first.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -----------------------------------------------------------------------------------------------------------

create or replace function credits._check_identity(
  issuer  text,
  subject text,
  kind    text
)
returns text
language plpgsql
immutable
as $$
begin
  perform credits._check_key(_check_identity.issuer, 'issuer');
  perform credits._check_key(_check_identity.subject, 'subject');
  return coalesce(credits._check_word(_check_identity.kind, 'kind', '{user,org}'), 'user');
end $$;

-- Empty, not null, once a transaction has set it. Set by whoever has checked the signature; headers are a client's word.
create or replace function credits._claims()
returns jsonb
language sql
stable
as $$
  select nullif(current_setting('request.jwt.claims', true), '')::jsonb
$$;

-- Checked again, since a gateway may let pass what has no aud or exp, and knows nothing of issuers.
create or replace function credits._is_trusted(
  claims jsonb,
  issuer credits.issuers
)
returns boolean
language sql
stable
as $$
  select coalesce(
    jsonb_typeof(_is_trusted.claims -> 'sub') = 'string' and _is_trusted.claims ->> 'sub' <> ''
    and (not (_is_trusted.issuer).require_aud
         or jsonb_typeof(_is_trusted.claims -> 'aud') in ('string', 'array')
            and _is_trusted.claims -> 'aud' ?| (_is_trusted.issuer).audiences)
    and ((_is_trusted.issuer).allow_anonymous or coalesce(_is_trusted.claims ->> 'is_anonymous', 'false') = 'false')
    and case jsonb_typeof(_is_trusted.claims -> 'exp') when 'number' then (_is_trusted.claims ->> 'exp')::numeric end
        > extract(epoch from credits.now()) - 30, false)
$$;

-- Whom the token of this transaction names: the user and, where its issuer says so, the organisation. No rows is nobody.
create or replace function credits._subjects()
returns setof credits.subject
language plpgsql
stable
as $$
declare
  v_claims jsonb := credits._claims();
  v_issuer credits.issuers;
  v_org    jsonb;
begin
  select i.* into v_issuer from credits.issuers i where i.issuer = v_claims ->> 'iss';
  if not found or not credits._is_trusted(v_claims, v_issuer) then
    return;
  end if;
  return next row(v_issuer.issuer, 'user', v_claims ->> 'sub')::credits.subject;
  v_org := v_claims #> v_issuer.org_claim;
  if jsonb_typeof(v_org) = 'string' then
    return next row(v_issuer.issuer, 'org', v_org #>> '{}')::credits.subject;
  end if;
end $$;
