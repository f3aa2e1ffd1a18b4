-- What the credits of an account were used for, out of the entries.

create or replace function credits.get_usage(
  account_id text,
  group_by   text        default 'day',
  since      timestamptz default null,
  until      timestamptz default null
)
returns setof credits.usage_summary
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_account credits.accounts := credits._account(get_usage.account_id);
  v_by      text := coalesce(credits._check_word(get_usage.group_by, 'group_by',
                                                 '{day,subject,capability,quality,model,member}'), 'day');
  v_since   timestamptz := coalesce(get_usage.since, credits._window('month', credits.now(), v_account.time_zone));
begin
  return query
    select case v_by
             when 'day'        then to_char(m.at at time zone v_account.time_zone, 'YYYY-MM-DD')
             when 'subject'    then m.subject
             when 'capability' then m.capability
             when 'quality'    then u.quality
             when 'model'      then u.model
             else m.member_id end as name,
           trim_scale(sum(m.credits)), trim_scale(sum(m.held)), count(distinct m.use)
      from credits._usage_moves(v_account.account_id, v_since, get_usage.until) m
      left join credits.usages u on u.account_id = v_account.account_id and u.usage_id = m.reservation_id
     group by 1
     order by case when v_by = 'day' then 0 else sum(m.credits) end desc, 1;
end $$;
comment on function credits.get_usage(text, text, timestamptz, timestamptz) is
'What the credits of an account were used for, by day, subject, capability, quality, model or member.

credits is what was used, net of what refund_spend gave back, with what was charged into debt; held is what open reservations
hold for work in flight; uses counts spends and reservations. Days are those of the account''s time zone. since is by default
the beginning of the month; until is exclusive, by default open. Uses without such a name are in a row without one. Quality
and model are those of authorize_usage.
Errors: 400 invalid_request, 404 account_not_found.';

-- Helpers -------------------------------------------------------------------------------------------------------------

-- Each movement of used credits in a span of time, and each open hold that began in it.
create or replace function credits._usage_moves(
  account_id text,
  since      timestamptz,
  until      timestamptz
)
returns setof credits.usage_move
language plpgsql
stable
as $$
declare
  v_now timestamptz := credits.now();
begin
  return query
    select e.created_at, e.subject, e.capability, e.member_id, e.reservation_id, e.debt - e.amount, 0::numeric,
           case when e.kind <> 'refund' then coalesce('r' || e.reservation_id, e.entry_seq::text) end
      from credits.entries e
     where e.account_id = _usage_moves.account_id and e.kind in ('spend', 'capture', 'settle', 'overdraft', 'refund')
       and e.entry_seq > credits._seq_at(_usage_moves.account_id, _usage_moves.since - interval '1 microsecond')
       and (_usage_moves.until is null or e.created_at < _usage_moves.until)
    union all
    select r.created_at, r.subject, r.capability, r.member_id, r.reservation_id, 0, r.amount - r.captured,
           'r' || r.reservation_id
      from credits.reservations r
     where r.account_id = _usage_moves.account_id and r.status = 'open' and r.expires_at > v_now
       and r.created_at >= _usage_moves.since and (_usage_moves.until is null or r.created_at < _usage_moves.until);
end $$;
