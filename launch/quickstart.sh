#!/usr/bin/env bash
# The whole path on real data: handwritten digits -> VAE -> latent shards -> DiT trained with
# DeepSpeed -> samples and a report, in runs/quickstart. About ten minutes on two CPU cores, download
# of packages aside. Run it again at any time: what is done is kept, and training resumes.
#   bash launch/quickstart.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

OUT=runs/quickstart
TRAINED=$OUT/run/checkpoints/latest # changes when a checkpoint is committed, and only then
export PYTHONWARNINGS=ignore::FutureWarning # of torch about DeepSpeed
NEEDED_MB=500

# Runs one step of the job. Its seconds are kept, those of broken-off attempts too, so that the
# report's figure is what the whole job took; not those of finding the training finished.
step() {
  local status=0 before
  say "$1" && STARTED=$SECONDS
  before=$(cat "$TRAINED" 2> /dev/null || true)
  "${@:2}" || status=$?
  [[ $status != 0 || $1 != *DiT* || $(cat "$TRAINED") != "$before" ]] || STARTED=
  account
  ((status == 0)) || die "failed while ${DOING,}; the lines above say why. Run the same command again to go on, or delete $OUT to begin anew." "$status"
}
account() {
  [[ -z ${STARTED:-} ]] || echo "$((SECONDS - STARTED)) $DOING" >> "$OUT/seconds.txt"
  STARTED=
}
trap account EXIT

# Succeeds if the product $1 is missing or older than what it is made from, $2.
outdated() { [[ ! -e $1 || $2 -nt $1 ]]; }

sample() {
  python tools/sample.py --run "$OUT/run" --vae "$OUT/vae" --classes 0-9 --cfg-scale 1.5 "$@"
}

use_environment quickstart
mkdir -p "$OUT"
free=$(df -Pm "$OUT" | awk 'NR == 2 { print $4 }')
((free >= NEEDED_MB)) || die "$PWD/$OUT has $free MB of free disk, and the job needs $NEEDED_MB MB."

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)) || [[ ${DS_ACCELERATOR:-} == cpu ]]; then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
  where="two CPU ranks" ranks=(--num_gpus 2)
else
  where="$gpus GPU(s)" ranks=()
fi

[[ -e $OUT/images ]] || step "Writing the digits as PNG files" \
  python -m dit_ds.digits images --out "$OUT/images"
[[ -e $OUT/vae ]] || step "Training the VAE (about a minute)" \
  python -m dit_ds.digits vae --images "$OUT/images" --out "$OUT/vae"
if outdated "$OUT/latents/manifest.json" "$OUT/vae/config.json"; then
  step "Encoding the images to latent shards" \
    python tools/precompute_latents.py --images "$OUT/images" --vae "$OUT/vae" --image-size 8 --out "$OUT/latents"
fi
step "Training the DiT with ZeRO-2 on $where" \
  launch/train.sh "${ranks[@]}" --config quickstart --run "$OUT/run" \
  --deepspeed_config ds_configs/zero2_fp32.json data.path="$OUT/latents"
if outdated "$OUT/samples.png" "$TRAINED"; then
  step "Sampling the grid" sample --per-class 8 --out "$OUT/samples.png"
fi
if outdated "$OUT/generated.npz" "$TRAINED"; then
  step "Sampling 900 digits for the report" \
    sample --per-class 90 --steps 50 --npz "$OUT/generated.npz" --out "$OUT/generated.png"
fi

say "Report"
python -m dit_ds.digits report --images "$OUT/images" --vae "$OUT/vae" \
  --generated "$OUT/generated.npz" --out "$OUT/report.json" \
  --seconds "$(awk '{ total += $1 } END { print total }' "$OUT/seconds.txt")"
echo "Look at $OUT/samples.png (a row for each digit); $OUT/report.json has the figures."
