"""The ModelDeployment API: models, CEL rules and the custom resource definition made of them."""

GROUP = "headrace.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "ModelDeployment"
PLURAL = "modeldeployments"
SINGULAR = "modeldeployment"
SHORT_NAMES = ("mdl",)
CATEGORIES = ("all", "headrace")
