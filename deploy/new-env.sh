# Prints a .env for docker-compose.yml, with passwords of its own: sh deploy/new-env.sh > .env
set -eu
umask 077
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
echo "# The owner of the database, for deploys. Set when the volume is made; later: alter role ... password"
echo "POSTGRES_PASSWORD=$(secret)"
echo "# The login of the door and of PostgREST, and Hasura's; taken over at each start."
echo "PGCREDITS_FORWARDER_PASSWORD=$(secret)"
echo "PGCREDITS_HASURA_PASSWORD=$(secret)"
echo "# Signs tokens (HS256) for the door, PostgREST and Hasura."
echo "PGCREDITS_JWT_SECRET=$(secret)"
echo "HASURA_GRAPHQL_ADMIN_SECRET=$(secret)"
echo "# Stripe: docs/stripe.md"
echo "STRIPE_SECRET_KEY="
echo "STRIPE_WEBHOOK_SECRET="
