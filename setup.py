"""The list of packages, which setup.cfg can't express: `find:` takes no package from elsewhere."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["rollout_server", "rollout_server.*"]),
        "rollout_server.integrations",
    ],
    package_dir={"rollout_server.integrations": "integrations"},
)
