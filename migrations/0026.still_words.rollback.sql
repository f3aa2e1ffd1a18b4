set local role credits_owner;
alter table credits.subscriptions drop column still_words, drop column receiving_at;
