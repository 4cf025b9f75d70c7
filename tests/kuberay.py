"""The fields of KubeRay 1.7's kinds (``ray.io/v1``) that are known here, by hand: names and types, no schema of theirs.

A type is a Python type, a tuple of allowed words, a list of one type, a dict of fields, or one of the names below.
"""

STRINGS = "a map of strings"
POD_TEMPLATE = "a pod template"

AUTH = {"mode": ("token", "disabled"), "secretName": str, "enableK8sTokenAuth": bool}
CLUSTER = {
    "rayVersion": str,
    "authOptions": AUTH,
    "enableInTreeAutoscaling": bool,
    "suspend": bool,
    "headGroupSpec": {"rayStartParams": STRINGS, "template": POD_TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": STRINGS,
            "template": POD_TEMPLATE,
        }
    ],
}
DELETION_RULE = {
    "policy": ("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
    "condition": {"jobStatus": ("SUCCEEDED", "FAILED"), "jobDeploymentStatus": ("Failed",), "ttlSeconds": int},
}
JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "jobId": str,
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "rayClusterSpec": CLUSTER,
    "clusterSelector": STRINGS,
    "metadata": STRINGS,
    "submitterPodTemplate": POD_TEMPLATE,
    "submitterConfig": {"backoffLimit": int},
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "preRunningDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "deletionStrategy": {"deletionRules": [DELETION_RULE]},
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "entrypointResources": str,
    "managedBy": str,
    "suspend": bool,
}
KINDS = {
    "RayCluster": CLUSTER,
    "RayJob": JOB,
    "RayCronJob": {"schedule": str, "timeZone": str, "suspend": bool, "jobTemplate": JOB},
    "RayService": {
        "serveConfigV2": str,
        "rayClusterConfig": CLUSTER,
        "upgradeStrategy": {"type": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")},
        "rayClusterDeletionDelaySeconds": int,
        "excludeHeadPodFromServeSvc": bool,
        "managedBy": str,
        "suspend": bool,
    },
}


def violations(value, form, where):
    """What of a value is not as its form says, one line each; pod templates are only told apart."""
    if isinstance(form, dict) and isinstance(value, dict):
        unknown = [f"{where}.{name}: no such field" for name in value.keys() - form.keys()]
        return unknown + [
            line for name in value.keys() & form.keys() for line in violations(value[name], form[name], f"{where}.{name}")
        ]
    if isinstance(form, list) and isinstance(value, list):
        return [line for number, item in enumerate(value) for line in violations(item, form[0], f"{where}[{number}]")]
    if isinstance(form, tuple):
        fits = value in form
    elif form == STRINGS:
        fits = isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    elif form == POD_TEMPLATE:
        fits = isinstance(value, dict) and value.keys() <= {"metadata", "spec"}
    else:
        fits = isinstance(form, type) and type(value) is form
    return [] if fits else [f"{where}: {value!r} is not {form}"]
