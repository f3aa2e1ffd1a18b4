# Makes the cluster on the first start, then becomes the server.
# POSTGRES_USER owns POSTGRES_DB and may make roles, and is no superuser. The superuser, postgres, has no password and
# comes in from inside the container alone: docker-compose exec db psql
set -eu
export POSTGRES_USER="${POSTGRES_USER:-credits_admin}" POSTGRES_DB="${POSTGRES_DB:-product}"
data=/var/lib/postgresql/data/15
new=$data.new

if [ ! -d "$data" ]; then
  : "${POSTGRES_PASSWORD:?is needed to make the database}"
  rm -rf "$new"  # of a first start that was cut short
  initdb -D "$new" -U postgres --auth-local=peer --auth-host=scram-sha-256 -E UTF8 --locale=C.UTF-8 --data-checksums
  echo 'host all all all scram-sha-256' >> "$new/pg_hba.conf"
  cat >> "$new/postgresql.conf" <<EOF
listen_addresses = '*'
max_worker_processes = 20
shared_preload_libraries = 'pg_cron'
# pg_cron lives in a database of its own: the one in which it lives can be neither dropped nor renamed.
cron.database_name = 'postgres'
# Without these it would log in by password as the owner of each entry.
cron.use_background_workers = on
EOF
  pg_ctl -D "$new" -w -o "-c listen_addresses=''" start
  psql --no-psqlrc -q -v ON_ERROR_STOP=1 <<'EOF'
\getenv name POSTGRES_USER
\getenv password POSTGRES_PASSWORD
\getenv db POSTGRES_DB
create role :"name" login createrole password :'password';
create database :"db" owner :"name";
create extension pg_cron;
grant usage on schema cron to :"name";
grant execute on function cron.schedule_in_database to :"name";
EOF
  pg_ctl -D "$new" -w -m fast stop
  mv "$new" "$data"
fi

exec postgres -D "$data" "$@"
