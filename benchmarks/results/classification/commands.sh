# Makes the records of classification: bash benchmarks/results/classification/commands.sh, from the repository's root.
# One command for each set of seeds; a comparison that was stopped goes on where it was. Written by benchmarks/proof.py.

python benchmarks/compare_examples.py --program examples/classification.py --config benchmarks/recipes/classification.yaml --output-dir runs/compare/classification --data path/to/cifar10 --seeds 0 1 2 --arms \
  "full lr*0.5=--training.policy full --training.lr 0.1" \
  "full lr*2=--training.policy full --training.lr 0.4" \
  "full=--training.policy full" \
  "ies=--training.policy ies" \
  "importance@0.7=--training.policy importance --training.budget 0.7" \
  "infobatch=--training.policy infobatch" \
  "orderdp@0.7=--training.policy orderdp --training.budget 0.7" \
  "quantile=--training.policy quantile" \
  "random@0.7=--training.policy random --training.budget 0.7" \
  "selective-backprop@0.7=--training.policy selective-backprop --training.budget 0.7" \
  "seta=--training.policy seta" \
  "shortened@0.5 lr*1.00=--training.policy full --training.epochs 5 --training.lr 0.2" \
  "shortened@0.5 lr*1.41=--training.policy full --training.epochs 5 --training.lr 0.28284271247461906" \
  "shortened@0.5 lr*2.00=--training.policy full --training.epochs 5 --training.lr 0.4" \
  "shortened@0.7 lr*1.00=--training.policy full --training.epochs 7 --training.lr 0.2" \
  "shortened@0.7 lr*1.20=--training.policy full --training.epochs 7 --training.lr 0.23904572186687872" \
  "shortened@0.7 lr*1.43=--training.policy full --training.epochs 7 --training.lr 0.28571428571428575" \
  "topk@0.6=--training.policy full --blocking.share 0.4 --blocking.method topk" \
  "unbiased@0.6=--training.policy full --blocking.share 0.4"
