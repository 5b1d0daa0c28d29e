#!/bin/sh
# Makes once, in an AWS account, what infra/ray/aws.yaml names: roles and instance profiles with the rights of this
# folder, the placement group of the machines that train, spot's own role, and the bucket's policy. Again does no harm.
#   ACCOUNT=123456789012 BUCKET=my-bucket IMAGES=my-images REGION=us-east-1 sh infra/policies/aws.sh
# It needs the AWS CLI as somebody who may change rights. Bucket, network and machine image are yours to make.
set -eu
: "${ACCOUNT:?the number of the account}" "${BUCKET:?the bucket of artifacts}" "${IMAGES:?the bucket of source images}"
: "${REGION:=us-east-1}"
here=$(cd "$(dirname "$0")" && pwd)
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"},
  "Action": "sts:AssumeRole"}]}'

filled() {   # FILE: a policy with this account's names
  sed -e "s/REPLACE-ACCOUNT/$ACCOUNT/g; s/REPLACE-BUCKET/$BUCKET/g; s/REPLACE-IMAGES/$IMAGES/g" \
    -e "s/us-east-1/$REGION/g" "$here/$1"
}

once() {     # COMMAND…: fine where what it makes is there already
  if ! said=$("$@" 2>&1); then
    case $said in
      *EntityAlreadyExists* | *LimitExceeded* | *"has been taken"* | *Duplicate*) ;;
      *) printf '%s\n' "$said" >&2; return 1 ;;
    esac
  fi
}

role() {     # NAME: of machines
  once aws iam create-role --role-name "$1" --assume-role-policy-document "$trust"
  aws iam put-role-policy --role-name "$1" --policy-name bucket --policy-document "$(filled bucket-access-aws.json)"
  once aws iam create-instance-profile --instance-profile-name "$1"
  once aws iam add-role-to-instance-profile --instance-profile-name "$1" --role-name "$1"
}

role latentforge-node
role latentforge-head
aws iam put-role-policy --role-name latentforge-head --policy-name autoscaler \
  --policy-document "$(filled autoscaler-aws.json)"
once aws iam create-service-linked-role --aws-service-name spot.amazonaws.com
once aws ec2 create-placement-group --region "$REGION" --group-name latentforge --strategy cluster
aws s3api put-bucket-policy --bucket "$BUCKET" --policy "$(filled bucket-aws.json)"
