select *
  from credits.spend_many((
    select jsonb_agg(jsonb_build_object(
             'account_id', 'acct_' || floor(:first + random() * (:last - :first + 1))::integer,
             'amount', 1,
             'key', gen_random_uuid()))
      from generate_series(1, :batch)));
