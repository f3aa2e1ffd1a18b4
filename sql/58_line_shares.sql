-- What the lines of an invoice, and of a period, entitle to together.
-- Keeps: over one subscription and period the lines never grant more than the largest full allowance that it reached, so a
-- way down and up again refills nothing.

-- Lines that give back reduce the other lines of the same invoice, first those that end with them, and never below nothing.
create or replace function credits._net_allowances(
  account_id text,
  invoice_id text
)
returns void
language plpgsql
as $$
declare
  v_back record;
  v_line record;
  v_left numeric;
  v_cut  numeric;
begin
  for v_back in
    select a.* from credits.allowances a
     where a.account_id = _net_allowances.account_id and a.invoice_id = _net_allowances.invoice_id and a.sign = -1
     order by a.slice_end, a.allowance_id
  loop
    v_left := v_back.first_credits;
    for v_line in
      select a.* from credits.allowances a
       where a.account_id = _net_allowances.account_id and a.invoice_id = _net_allowances.invoice_id
         and a.sign = 1 and a.kind = 'plan' and a.first_credits > 0
       order by a.slice_end = v_back.slice_end desc, a.slice_end desc, a.allowance_id
    loop
      v_cut  := least(v_left, v_line.first_credits);
      v_left := v_left - v_cut;
      update credits.allowances a
         set first_credits = a.first_credits - v_cut
       where a.account_id = v_line.account_id and a.allowance_id = v_line.allowance_id;
    end loop;
  end loop;

  -- Lines of a time that is over ride on the next invoice; their credits can be used as long as those of that invoice.
  update credits.allowances a
     set expires_at = greatest(a.slice_end, x.slice_end)
    from (select max(n.slice_end) as slice_end from credits.allowances n
           where n.account_id = _net_allowances.account_id and n.invoice_id = _net_allowances.invoice_id
             and n.sign = 1 and n.kind = 'plan') x
   where a.account_id = _net_allowances.account_id and a.invoice_id = _net_allowances.invoice_id
     and a.sign = 1 and a.kind = 'plan';
end $$;

-- Grants the first slices of an invoice's lines.
create or replace function credits._grant_allowances(
  account_id text,
  invoice_id text
)
returns jsonb
language plpgsql
as $$
declare
  v_line    credits.allowances;
  v_effects jsonb := jsonb '[]';
begin
  for v_line in
    select a.*
      from credits.allowances a
     where a.account_id = _grant_allowances.account_id and a.invoice_id = _grant_allowances.invoice_id
       and a.sign = 1 and a.kind = 'purchase' and a.first_credits > 0
     order by a.allowance_id
  loop
    v_effects := v_effects || credits._grant_line(v_line, v_line.first_credits, 0);
  end loop;
  for v_line in
    select distinct on (a.subscription_id, a.slice_end, a.kind) a.*
      from credits.allowances a
     where a.account_id = _grant_allowances.account_id and a.invoice_id = _grant_allowances.invoice_id
       and a.sign = 1 and a.kind <> 'purchase'
     order by a.subscription_id, a.slice_end, a.kind
  loop
    v_effects := v_effects || credits._grant_period(v_line.account_id, v_line.subscription_id, v_line.slice_end, v_line.kind);
  end loop;
  return v_effects;
end $$;

-- All lines of a period together: each gets its share of what the period may grant, the earliest invoice first. An invoice
-- that comes late takes from later ones what is its own, so that a refund finds the same credits in any order.
drop function if exists credits._grant_period(text, text, timestamptz);
create or replace function credits._grant_period(
  account_id      text,
  subscription_id text,
  slice_end       timestamptz,
  kind            text        default 'plan'
)
returns jsonb
language plpgsql
as $$
declare
  v_share   credits.line_share;
  v_line    credits.allowances;
  v_effects jsonb := jsonb '[]';
begin
  for v_share in
    select s.*
      from credits._line_shares(_grant_period.account_id, _grant_period.subscription_id, _grant_period.slice_end,
                                _grant_period.kind) s
     where s.granted <> s.target
     order by s.granted < s.target, s.place
  loop
    select a.* into v_line
      from credits.allowances a
     where a.account_id = _grant_period.account_id and a.allowance_id = v_share.allowance_id;
    if v_share.granted > v_share.target then
      perform credits._shrink_line(v_line, v_share.granted - v_share.target);
    else
      v_effects := v_effects || credits._grant_line(v_line, v_share.target - v_share.granted, v_share.parts);
    end if;
  end loop;
  return v_effects;
end $$;

create or replace function credits._grant_line(
  line   credits.allowances,
  amount numeric,
  parts  bigint
)
returns jsonb
language plpgsql
as $$
declare
  v_line credits.allowances := _grant_line.line;
begin
  return credits._grant_slice(v_line.account_id, v_line.subscription_id, v_line.allowance_id, v_line.invoice_id, 0,
    _grant_line.amount, v_line.kind, v_line.plan, v_line.period_start, v_line.slice_end, v_line.expires_at,
    format('sub:%s:%s', v_line.invoice_id, v_line.line_id) || case when _grant_line.parts > 0 then ':' || _grant_line.parts else '' end);
end $$;

-- Takes from the grants of a line what turned out to be an earlier line's. What was spent of it becomes debt, which the
-- earlier line's grant pays in the same transaction.
create or replace function credits._shrink_line(
  line   credits.allowances,
  amount numeric
)
returns void
language plpgsql
as $$
declare
  v_left  numeric := _shrink_line.amount;
  v_grant record;
  v_entry credits.entries;
  v_move  numeric;
begin
  for v_grant in
    select p.grant_id, g.amount - p.moved as left
      from credits.plan_grants p
      join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
     where p.account_id = (_shrink_line.line).account_id and p.allowance_id = (_shrink_line.line).allowance_id and p.slice = 0
       and g.amount > p.moved
     order by p.grant_id desc
  loop
    v_move := least(v_left, v_grant.left);
    exit when v_move = 0;
    v_left := v_left - v_move;
    update credits.plan_grants p
       set moved = p.moved + v_move
     where p.account_id = (_shrink_line.line).account_id and p.grant_id = v_grant.grant_id
    returning p.moved into v_entry.amount;
    perform credits._settle_source('invoice', (_shrink_line.line).invoice_id, (_shrink_line.line).account_id);
    v_entry.account_id  := (_shrink_line.line).account_id;
    v_entry.operation   := 'move';
    v_entry.key         := format('move:%s:%s', v_grant.grant_id, trim_scale(v_entry.amount));
    v_entry.fingerprint := jsonb_build_object('moved', v_entry.amount);
    perform credits._revoke(credits._balance(v_entry.account_id), v_entry, v_grant.grant_id, v_move)
      from credits.grants g
     where g.account_id = v_entry.account_id and g.grant_id = v_grant.grant_id
       and g.amount - g.expired - g.revoked - g.owed >= v_move;
  end loop;
end $$;

-- What each line of a period is to get, and has. A trial is a period of its own, whatever is changed in it. The cap, being a
-- subquery, is asked for once and not for each line.
drop function if exists credits._line_shares(text, text, timestamptz);
create or replace function credits._line_shares(
  account_id      text,
  subscription_id text,
  slice_end       timestamptz,
  kind            text        default 'plan'
)
returns setof credits.line_share
language sql
stable
as $$
  select a.allowance_id, row_number() over earlier,
         least(a.first_credits,
               greatest(0, c.cap - coalesce(sum(a.first_credits) over (earlier rows between unbounded preceding and 1 preceding), 0))),
         p.granted, p.parts
    from credits.allowances a,
         lateral (select coalesce(sum(g.amount - n.moved), 0) as granted, count(*) as parts
                    from credits.plan_grants n
                    join credits.grants g on g.account_id = n.account_id and g.grant_id = n.grant_id
                   where n.account_id = a.account_id and n.allowance_id = a.allowance_id and n.slice = 0) p,
         (select (select credits._period_cap(_line_shares.account_id, _line_shares.subscription_id, _line_shares.slice_end,
                                             _line_shares.kind)) as cap) c
   where a.account_id = _line_shares.account_id and a.subscription_id = _line_shares.subscription_id
     and a.slice_end = _line_shares.slice_end and a.sign = 1 and a.kind = _line_shares.kind
  window earlier as (order by a.invoiced_at, a.allowance_id)
$$;

-- What the lines of a subscription may grant for a period: the largest full allowance that it has reached, less what months
-- of longer lines have granted for it. That is the largest that one invoice bills for each item, in a line for each tier of
-- its price, and no more than all items together ever came to from one invoice to the next: a line need not name its item, and
-- such a one replaces what the same invoice gives back. What one invoice bills counts whole: of two in one second nobody knows
-- which was first.
drop function if exists credits._period_cap(text, text, timestamptz);
create or replace function credits._period_cap(
  account_id      text,
  subscription_id text,
  slice_end       timestamptz,
  kind            text        default 'plan'
)
returns numeric
language plpgsql
stable
as $$
begin
  return (
    with lines as (
      select a.item_id, a.invoiced_at, a.invoice_id, a.sign, a.credits
        from credits.allowances a
       where a.account_id = _period_cap.account_id and a.subscription_id = _period_cap.subscription_id
         and a.kind = _period_cap.kind
         and (a.slice_end = _period_cap.slice_end
              or a.sliced and _period_cap.slice_end > a.period_start and _period_cap.slice_end <= a.period_end)
    ), items as (
      select sum(i.credits) as credits
        from (select max(n.credits) as credits
                from (select l.item_id, sum(l.credits) as credits from lines l where l.sign = 1
                       group by l.item_id, l.invoice_id) n
               group by n.item_id) i
    ), invoices as (
      select sum(sum(l.sign * l.credits)) over (order by l.invoiced_at, l.invoice_id) as reached,
             coalesce(sum(l.credits) filter (where l.sign = 1), 0) as own
        from lines l
       group by l.invoiced_at, l.invoice_id
    )
    select greatest(0,
      (select least(i.credits, max(greatest(n.reached, n.own))) from items i, invoices n group by i.credits)
      - coalesce((select sum(g.amount - p.moved)
                    from credits.plan_grants p
                    join credits.grants g on g.account_id = p.account_id and g.grant_id = p.grant_id
                   where p.account_id = _period_cap.account_id and p.subscription_id = _period_cap.subscription_id
                     and p.period_end = _period_cap.slice_end and p.slice > 0 and g.status <> 'pending'), 0)));
end $$;
