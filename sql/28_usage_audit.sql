-- What must hold between usages, their reservations and the windows that count them, and between the catalogue and the offers
-- that a look at access finds. Part of audit().

create or replace function credits._audit_usages()
returns setof credits.audit_finding
language plpgsql
stable
as $$
declare
  v_now timestamptz := credits.now();
begin
  return query
    select 'usages_are_as_their_reservations', u.account_id,
           jsonb_build_object('usage_id', u.usage_id, 'status', u.status, 'reservation', r.status,
                              'counted', u.counted_credits, 'charged', r.captured + coalesce(r.charged, 0))
      from credits.usages u
      left join credits.reservations r on r.account_id = u.account_id and r.reservation_id = u.usage_id
     where (u.status::text, u.amount::numeric, u.counted_credits) is distinct from
           (r.status::text, r.amount::numeric,
            case r.status when 'open' then r.amount else r.captured + coalesce(r.charged, 0) end);
  return query
    select 'windows_count_their_usages', w.account_id,
           jsonb_build_object('capability', w.capability, 'period', w.period, 'calls', w.calls, 'usages', n.calls,
                              'units', w.units, 'usages_units', n.units, 'credits', w.credits, 'usages_credits', n.credits)
      from credits.usage_windows w, lateral credits._recounted(w, w.window_start) n
     where (w.calls, w.units, w.credits) is distinct from (n.calls, n.units, n.credits);
  return query
    select 'admissions_are_numbered', a.account_id, jsonb_build_object('capability', a.capability, 'number', a.number)
      from (select n.*, lag(n.number) over (partition by n.account_id, n.capability order by n.admitted_at, n.number) as before
              from credits.usage_admissions n) a
     where a.number <> a.before + 1;
  return query
    select 'offers_are_what_plans_say', null, to_jsonb(d)
      from (select o.* from credits.offers o where o.valid_until > v_now
            except
            select n.* from credits._offers_at(v_now) n) d;
end $$;
