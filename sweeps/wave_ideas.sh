#!/usr/bin/env bash
# Every published idea of PR #1434 against a cosine control, with three arms that change next to nothing.
#
# bash sweeps/wave_ideas.sh --jobs 2 --val-tokens 65536
#
# Six layers, since MYCORRHIZAL pairs blocks three apart. As in #1434's runs, this ends after too few steps for
# Muon's momentum to warm up; unlike theirs, its schedules end. Strengths are #1434's where its log or scripts
# name one; intervals and horizons are the same share of the run as there (400 steps).
source "$(dirname "$0")/lib.sh"

question "What does each published idea change, beside the noise of the same sweep?"
base baseline MODEL_DIM=96 NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=2048 \
  MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=40 DATA_SHUFFLE=1 \
  DEVICE=cpu DTYPE=fp32 COMPILE=0 \
  COSINE_LR=1 NUM_LAYERS=6 ITERATIONS=120

arm null_adam_eps "too small a change to matter: it shows the noise" ADAM_EPS=0.00000001001
arm null_beta2 "too small a change to matter: it shows the noise" BETA2=0.950001
arm null_matrix_lr "too small a change to matter: it shows the noise" MATRIX_LR=0.0400001
arm tidal_lr "worked there" COSINE_LR=0 TIDAL_LR=1
arm warmdown "the baseline's linear decay, 9 % of the run" COSINE_LR=0 WARMDOWN_ITERS=11
arm cosine_cycles "a second period: rejected there" COSINE_CYCLES=2
arm golden_lr "broken there, mended here" GOLDEN_LR=1
arm tidal_short_rise "its peak at a tenth of the run: the knob was not read there" COSINE_LR=0 TIDAL_LR=1 TIDAL_WARMUP=0.1
arm breathing_lr "rejected there" COSINE_LR=0 BREATHING_LR=1
arm whale_lr "rejected there" COSINE_LR=0 WHALE_LR=1
arm circadian_lr "rejected there" COSINE_LR=0 CIRCADIAN_LR=1
arm cosmo_lr "rejected there" COSINE_LR=0 COSMO_LR=1
arm punctuated_lr "rejected there" COSINE_LR=0 PUNCTUATED_LR=1
arm root_first "broken there, mended here" COSINE_LR=0 ROOT_FIRST=1
arm coral_lr "broken there, mended here" COSINE_LR=0 CORAL_LR=1
arm mirror_train "broken there, mended here" MIRROR_TRAIN=0.1
arm embed_mixup "rejected there" EMBED_MIXUP=0.1
arm token_drop "rejected there" TOKEN_DROP=0.05
arm metamorphosis "broken there, mended here" METAMORPHOSIS=0.1
arm focal_gamma "rejected there" FOCAL_GAMMA=2
arm gamma_anneal "broken there, mended here" FOCAL_GAMMA=2 GAMMA_ANNEAL=1
arm label_smooth "rejected there" LABEL_SMOOTH=0.1
arm z_loss "rejected there" Z_LOSS=0.0001
arm logit_penalty "rejected there" LOGIT_PENALTY=0.00001
arm logit_temp "never run there" LOGIT_TEMP=1.2
arm entropy_bonus "never run there" ENTROPY_BONUS=0.01
arm multi_token "broken there, mended here" MULTI_TOKEN=0.1
arm head_diversity "broken there, mended here" HEAD_DIVERSITY=0.0001
arm grad_central "never run there" GRAD_CENTRAL=1
arm mycorrhizal "rejected there" MYCORRHIZAL=0.1
arm thermal_vent "rejected there" THERMAL_VENT=1
arm sam_rho "broken there, mended here" SAM_RHO=0.05
arm canopy_lr "broken there, mended here" CANOPY_LR=1
arm wd_schedule "broken there, mended here" WD_SCHEDULE=0.04
arm wd_schedule_full "the same, 25 times as strong" WD_SCHEDULE=1
arm predprey_lr "broken there, mended here" PREDPREY_LR=1
arm controlled_burn "rejected there" CONTROLLED_BURN=0.05 BURN_INTERVAL=15
arm synaptic_scale "broken there, mended here" SYNAPTIC_SCALE=1
arm weight_perturb "rejected there" WEIGHT_PERTURB=0.0001 PERTURB_INTERVAL=30
arm mutation_decay "rejected there" MUTATION_DECAY=0.001
arm layer_drop "broken there, mended here" LAYER_DROP=0.2
arm progressive_grow "broken there, mended here" PROGRESSIVE_GROW=1
arm head_prune "never run there" HEAD_PRUNE=0.5
arm weight_share "broken there, mended here" WEIGHT_SHARE=3
arm attn_recycle "broken there, mended here" ATTN_RECYCLE=1
arm parallel_block "worked there" PARALLEL_BLOCK=1
arm silu2 "worked there" MLP_ACT=silu2
arm swiglu "worked there" MLP_ACT=swiglu
arm sandwich_norm "rejected there" SANDWICH_NORM=1
arm encoder0 "no layer feeds the skips: the best there" ENCODER_LAYERS=0
arm encoder1 "one layer feeds the skips: worked there" ENCODER_LAYERS=1
arm embed_scale "broken there, mended here" EMBED_SCALE=22.6

control_every 10
seeds 1337 42 7
decide "an idea inside the noise is not worth its lines"
run_wave "$@"
