select *
  from credits.spend_many((
    select jsonb_agg(jsonb_build_object(
             'account_id', 'acct_' || (:first::integer + floor(random() * (:last::integer - :first::integer + 1))::integer),
             'amount', 1,
             'key', gen_random_uuid()))
      from generate_series(1, :batch::integer)));
