#!/bin/sh
# Makes once, in a Google project, what infra/ray/gcp.yaml names: the machines' accounts and their rights, the secret of
# the bucket's keys, and the placement of machines that train. Again does no harm.
#   PROJECT=my-project REGION=us-central1 sh infra/policies/gcp.sh
# It needs the gcloud CLI as somebody who may change rights. Bucket, its HMAC keys, network and machine image are yours
# to make; the keys go into the secret, as two lines that docs/operations.md shows:
#   gcloud secrets versions add latentforge-bucket-keys --data-file=keys --project=my-project
set -eu
: "${PROJECT:?the project}" "${REGION:=us-central1}"

once() {     # COMMAND…: fine where what it makes is there already
  if ! said=$("$@" 2>&1); then
    case $said in
      *"already exists"* | *ALREADY_EXISTS*) ;;
      *) printf '%s\n' "$said" >&2; return 1 ;;
    esac
  fi
}

node=latentforge-node@$PROJECT.iam.gserviceaccount.com
head=latentforge-head@$PROJECT.iam.gserviceaccount.com
once gcloud iam service-accounts create latentforge-node --project="$PROJECT"
once gcloud iam service-accounts create latentforge-head --project="$PROJECT"
# The head's autoscaler starts and ends machines, and gives them the nodes' account.
gcloud projects add-iam-policy-binding "$PROJECT" --member="serviceAccount:$head" \
  --role=roles/compute.instanceAdmin.v1 --condition=None
gcloud iam service-accounts add-iam-policy-binding "$node" --member="serviceAccount:$head" \
  --role=roles/iam.serviceAccountUser --project="$PROJECT"
once gcloud secrets create latentforge-bucket-keys --project="$PROJECT"
for account in "$node" "$head"; do
  gcloud secrets add-iam-policy-binding latentforge-bucket-keys --member="serviceAccount:$account" \
    --role=roles/secretmanager.secretAccessor --project="$PROJECT"
done
once gcloud compute resource-policies create group-placement latentforge --collocation=collocated \
  --region="$REGION" --project="$PROJECT"
