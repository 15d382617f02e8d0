"""Routes about repositories as wholes: account, create, delete, settings, information, lists, refs, history."""

from __future__ import annotations

import json
from typing import Any

import yaml

from .cards import check_card, parse_card, repo_tags
from .errors import HubError, revision_not_found
from .store import Commit, Repo
from .wire import Answer, Call, route


SORT_KEYS = {"createdAt", "lastModified", "downloads", "likes", "trendingScore"}


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org} for org in call.user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return Answer({"type": "user", "name": call.user.name, "fullname": call.user.name, "orgs": orgs, "auth": auth})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Answer:
    return Answer({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    errors, warnings = check_card(call.json["content"])
    body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer(body, status=400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    fields = call.json
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    namespace = fields.get("organization") or call.user.name
    call.check_owner(namespace)
    repo_type, private = fields.get("type") or "model", fields.get("private") or fields.get("visibility") == "private"
    url = {"url": f"{call.hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}{namespace}/{fields['name']}"}
    try:
        repo = call.hub.store.create(repo_type, f"{namespace}/{fields['name']}", private, call.user.name)
    except HubError as error:
        raise HubError(409, error.message, body=url) from None
    return Answer({**url, "name": repo.id, "private": private})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    fields = call.json
    namespace = fields.get("organization") or (call.user.name if call.user else "")
    call.params = {"repo": f"{namespace}/{fields['name']}", "type": (fields.get("type") or "model") + "s"}
    repo = call.repo(write=True)
    call.hub.store.delete(repo.type, repo.id)
    return Answer({})


@route("PUT", "/api/TYPE/REPO/settings")
def settings(call: Call) -> Answer:
    repo, fields = call.repo(write=True), call.json
    if "private" in fields or "visibility" in fields:
        repo.private = fields.get("private") or fields.get("visibility") == "private"
    return Answer({"private": repo.private})


@route("GET", "/api/TYPE/REPO/auth-check")
def auth_check(call: Call) -> Answer:
    call.repo()
    return Answer("OK")


@route("GET", "/api/TYPE/REPO/refs")
def refs(call: Call) -> Answer:
    repo = call.repo()

    def listed(names: dict[str, Commit], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": commit.sha} for name, commit in names.items()]

    with call.hub.store.lock:
        body: dict[str, Any] = {"branches": listed(repo.branches, "refs/heads/"), "converts": []}
        body["tags"] = listed(repo.tags, "refs/tags/")
        if call.flag("include_prs"):
            pulls = {f"refs/pr/{number}": commit for number, commit in repo.pulls.items()}
            body["pullRequests"] = listed(pulls, "")
    return Answer(body)


@route("POST", "/api/TYPE/REPO/tag/(?P<revision>[^/]+)")
def create_tag(call: Call) -> Answer:
    repo, fields = call.repo(write=True), call.json
    with call.hub.store.lock:
        commit = repo.resolve(call.params["revision"])
        if fields["tag"] in repo.tags:
            raise HubError(409, f"Tag {fields['tag']} already exists")
        repo.tags[fields["tag"]] = commit
    return Answer({})


@route("DELETE", "/api/TYPE/REPO/tag/(?P<tag>[^/]+)")
def delete_tag(call: Call) -> Answer:
    repo = call.repo(write=True)
    with call.hub.store.lock:
        if repo.tags.pop(call.params["tag"], None) is None:
            raise revision_not_found(call.params["tag"], repo.id)
    return Answer({})


@route("POST", "/api/TYPE/REPO/branch/(?P<branch>[^/]+)")
def create_branch(call: Call) -> Answer:
    repo, branch = call.repo(write=True), call.params["branch"]
    with call.hub.store.lock:
        if branch in repo.branches:
            raise HubError(409, f"Branch {branch} already exists")
        repo.branches[branch] = repo.resolve(call.json.get("startingPoint") or "main")
    return Answer({})


@route("DELETE", "/api/TYPE/REPO/branch/(?P<branch>[^/]+)")
def delete_branch(call: Call) -> Answer:
    repo, branch = call.repo(write=True), call.params["branch"]
    if branch == "main":
        raise HubError(403, "Cannot delete the main branch")
    with call.hub.store.lock:
        if repo.branches.pop(branch, None) is None:
            raise revision_not_found(branch, repo.id)
    return Answer({})


@route("GET", "/api/TYPE/REPO/commits/(?P<revision>[^/]+)")
def list_commits(call: Call) -> Answer:
    return call.paged(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in call.repo().resolve(call.params["revision"]).history()
        ]
    )


@route("GET", "/api/TYPE/REPO/revision/(?P<revision>[^/]+)")
@route("GET", "/api/TYPE/REPO")
def repo_info(call: Call) -> Answer:
    repo = call.repo()
    with call.hub.store.lock:
        commit = repo.resolve(call.params.get("revision", "main"))
    info = describe(call, repo, commit)
    if call.flag("blobs"):
        info["siblings"] = []
        for path, blob in sorted(commit.files.items()):
            sibling = {"rfilename": path, "size": blob.size, "blobId": blob.entry(path)["oid"]}
            if blob.lfs:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
            info["siblings"].append(sibling)
    return Answer(expanded(call, info))


@route("GET", "/api/TYPE")
def list_repos(call: Call) -> Answer:
    """Repositories that hold every `filter` tag, by `author`, with `search` in the id; newest or most first."""
    hub, query = call.hub, call.request.query
    with hub.store.lock:
        found = [(repo, repo.resolve("main")) for repo in hub.store.repos.values() if repo.type == call.repo_type]
    infos = [describe(call, repo, commit) for repo, commit in found if call.may_read(repo)]
    infos = [info for info in infos if set(call.values("filter")) <= {*info["tags"]}]
    if "author" in query:
        infos = [info for info in infos if info["author"] == query["author"][0]]
    if "pipeline_tag" in query:
        infos = [info for info in infos if info.get("pipeline_tag") == query["pipeline_tag"][0]]
    if "search" in query:
        infos = [info for info in infos if query["search"][0].lower() in info["id"].lower()]
    key = query.get("sort", ["lastModified"])[0]
    if key not in SORT_KEYS:
        raise HubError(400, f"Cannot sort by {key}")
    infos.sort(key=lambda info: info.get(key, 0), reverse=True)
    dropped = set() if call.flag("full") or call.values("expand") else {"siblings", "sha", "lastModified", "author"}
    if not call.flag("cardData") and not call.values("expand"):
        dropped.add("cardData")
    infos = [{name: value for name, value in expanded(call, info).items() if name not in dropped} for info in infos]
    return call.paged(infos, limit=int(query["limit"][0]) if "limit" in query else None)


def describe(call: Call, repo: Repo, commit: Commit) -> dict[str, Any]:
    """All that the Hub tells about a repository at a commit."""
    card, config = read_card(call, commit), read_config(call, commit)
    info = {
        "_id": commit.sha[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": repo_tags(card, commit.files.keys()),
        "cardData": json.loads(json.dumps(card, default=str)),
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        "usedStorage": sum(blob.size for blob in commit.files.values()),
    }
    if repo.type == "model":
        info |= {"modelId": repo.id, "config": config}
        info |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
    return info


def expanded(call: Call, info: dict[str, Any]) -> dict[str, Any]:
    """Only the properties that `expand` names, if it names any."""
    wanted = {"_id", "id", "modelId", *call.values("expand")}
    return {name: value for name, value in info.items() if name in wanted} if call.values("expand") else info


def read_card(call: Call, commit: Commit) -> dict[str, Any]:
    if "README.md" not in commit.files:
        return {}
    try:
        return parse_card(call.hub.store.path(commit.files["README.md"].sha256).read_text("utf-8", "replace"))
    except yaml.YAMLError:
        return {}


def read_config(call: Call, commit: Commit) -> dict[str, Any]:
    """The parts of config.json and of PEFT's adapter_config.json that the Hub repeats."""
    config: dict[str, Any] = {}
    for path, names in (("config.json", ("architectures", "model_type")), ("adapter_config.json", ())):
        if path not in commit.files:
            continue
        try:
            content = json.loads(call.hub.store.path(commit.files[path].sha256).read_bytes())
        except ValueError:
            continue
        config |= {name: content[name] for name in names if name in content}
        if path == "adapter_config.json":
            config["peft"] = {name: content.get(name) for name in ("base_model_name_or_path", "task_type")}
    return config
