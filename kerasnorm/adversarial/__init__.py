"""Robustness of classifiers: attacks, accuracy under them, training against them.

result = kerasnorm.adversarial.evaluate(model, x, y, attacks="standard", eps=8 / 255)
"""

from kerasnorm.adversarial.apgd import apgd as apgd
from kerasnorm.adversarial.attack import Attack as Attack
from kerasnorm.adversarial.attack import names as names
from kerasnorm.adversarial.ball import Ball as Ball
from kerasnorm.adversarial.evaluate import Evaluator as Evaluator
from kerasnorm.adversarial.evaluate import evaluate as evaluate
from kerasnorm.adversarial.evaluate import standard as standard
from kerasnorm.adversarial.evaluation import Evaluation as Evaluation
from kerasnorm.adversarial.fab import fab as fab
from kerasnorm.adversarial.gradient import bim as bim
from kerasnorm.adversarial.gradient import fgsm as fgsm
from kerasnorm.adversarial.gradient import mi_fgsm as mi_fgsm
from kerasnorm.adversarial.gradient import noise as noise
from kerasnorm.adversarial.gradient import pgd as pgd
from kerasnorm.adversarial.minimal import carlini_wagner as carlini_wagner
from kerasnorm.adversarial.minimal import deepfool as deepfool
from kerasnorm.adversarial.square import square as square
from kerasnorm.adversarial.training import adversarial_training as adversarial_training
from kerasnorm.adversarial.transfer import transfer as transfer
