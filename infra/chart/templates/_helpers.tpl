{{/* What a schema cannot say. */}}
{{- define "latentzoom.check" -}}
{{- range $name := list "cpuWorkers" "gpuWorkers" -}}
{{- $group := index $.Values $name -}}
{{- if gt (int $group.min) (int $group.max) -}}
{{- fail (printf "%s.min = %d is more than %s.max = %d" $name (int $group.min) $name (int $group.max)) -}}
{{- end -}}
{{- end -}}
{{- if lt (int .Values.gpuWorkers.cpus) (int .Values.gpuWorkers.gpus) -}}
{{- fail (printf "gpuWorkers.cpus = %d is less than gpuWorkers.gpus = %d: each GPU's worker needs a CPU" (int .Values.gpuWorkers.cpus) (int .Values.gpuWorkers.gpus)) -}}
{{- end -}}
{{- end -}}

{{- define "latentzoom.trackingUri" -}}
{{- if .Values.trackingUri -}}
{{- .Values.trackingUri -}}
{{- else if .Values.mlflow.enabled -}}
http://{{ .Release.Name }}-mlflow.{{ .Release.Namespace }}.svc:5000
{{- else -}}
{{- fail "give trackingUri, the MLflow server as the pods see it, or set mlflow.enabled" -}}
{{- end -}}
{{- end -}}

{{- define "latentzoom.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "latentzoom.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* What Kueue reads; it admits a cluster as a whole, so nothing may be scaled then. */}}
{{- define "latentzoom.labels" -}}
app.kubernetes.io/name: latentzoom
app.kubernetes.io/instance: {{ .Release.Name }}
{{- with .Values.cluster.queue }}
kueue.x-k8s.io/queue-name: {{ . }}
{{- end }}
{{- end -}}

{{/* Arguments: root, the group's values, the container's name. */}}
{{- define "latentzoom.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels: {app.kubernetes.io/name: latentzoom}
spec:
  # Only the head's autoscaler talks to Kubernetes.
  automountServiceAccountToken: {{ and (eq .name "ray-head") (eq $values.cluster.queue "") }}
  enableServiceLinks: false
  {{- with $values.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ $values.cluster.graceSeconds }}
  securityContext: {{ include "latentzoom.podSecurity" .root | nindent 4 }}
  {{- with .group.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ printf "%s:%v" $values.image.repository $values.image.tag | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      workingDir: /home/latentzoom
      env:
        - {name: MLFLOW_TRACKING_URI, value: {{ include "latentzoom.trackingUri" .root | quote }}}
        - {name: LATENTZOOM_CACHE, value: /scratch/cache}
        - {name: TMPDIR, value: /scratch}
        # Else Ray follows TMPDIR, away from where KubeRay's autoscaler looks.
        - {name: RAY_TMPDIR, value: /tmp}
        # Ray drains a pod for 30 s unless told otherwise; training needs what Kubernetes gives, less some for the end.
        - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ sub (int $values.cluster.graceSeconds) 10 | quote }}}
        {{- with $values.s3Endpoint }}
        - {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
        {{- end }}
      {{- with $values.secretName }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      securityContext: {{ include "latentzoom.containerSecurity" .root | nindent 8 }}
      resources:
        {{- range $kind := list "requests" "limits" }}
        {{ $kind }}:
          cpu: {{ $.group.cpus | quote }}
          memory: {{ printf "%vGi" $.group.memoryGib }}
          ephemeral-storage: {{ printf "%vGi" $.group.scratchGib }}
          {{- with $.group.gpus }}
          nvidia.com/gpu: {{ . | quote }}
          {{- end }}
        {{- end }}
      # No volume at /dev/shm: KubeRay adds one of the size of the pod's memory, for Ray's object store.
      volumeMounts:
        - {name: scratch, mountPath: /scratch}
  volumes:
    - {name: scratch, emptyDir: {sizeLimit: {{ printf "%vGi" .group.scratchGib }}}}
{{- end -}}

{{/* Arguments: root, the group's values, its name. */}}
{{- define "latentzoom.group" -}}
{{- $queue := .root.Values.cluster.queue -}}
{{- $least := ternary .group.max .group.min (ne $queue "") -}}
groupName: {{ .name }}
replicas: {{ $least }}
minReplicas: {{ $least }}
maxReplicas: {{ .group.max }}
rayStartParams: {}
template: {{ include "latentzoom.pod" (dict "root" .root "group" .group "name" "ray-worker") | nindent 2 }}
{{- end -}}

{{- define "latentzoom.clusterSpec" -}}
{{- include "latentzoom.check" . -}}
rayVersion: {{ .Values.cluster.rayVersion | quote }}
authOptions: {mode: token}
{{- if .Values.cluster.queue }}
enableInTreeAutoscaling: false
{{- else }}
enableInTreeAutoscaling: true
autoscalerOptions:
  version: v2
  upscalingMode: Default
  idleTimeoutSeconds: {{ .Values.cluster.idleSeconds }}
  securityContext: {{ include "latentzoom.containerSecurity" . | nindent 4 }}
{{- end }}
{{- with .Values.gcs }}
{{- if .redisAddress }}
gcsFaultToleranceOptions:
  redisAddress: {{ .redisAddress | quote }}
  {{- with .redisPasswordSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ . }}, key: password}
  {{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    num-cpus: "0"
    dashboard-host: 0.0.0.0    # inside the pod network, behind the token
  template: {{ include "latentzoom.pod" (dict "root" . "group" .Values.head "name" "ray-head") | nindent 4 }}
workerGroupSpecs:
  - {{ include "latentzoom.group" (dict "root" . "group" .Values.cpuWorkers "name" "cpu") | nindent 4 | trim }}
  - {{ include "latentzoom.group" (dict "root" . "group" .Values.gpuWorkers "name" "gpu") | nindent 4 | trim }}
{{- end -}}

{{/* The command of the RayJob: each GPU is a worker, however many a pod has. */}}
{{- define "latentzoom.command" -}}
{{- $job := .Values.job -}}
{{- $gpu := .Values.gpuWorkers -}}
{{- $most := mul $gpu.max $gpu.gpus -}}
{{- $least := ternary $most (mul $gpu.min $gpu.gpus) (ne .Values.cluster.queue "") -}}
latentzoom pipeline --preset {{ $job.preset }} --source {{ $job.source }} --source-url {{ $job.sourceUrl | squote }}
{{- printf " --workdir %s --name %s" (squote $job.workdir) (squote $job.modelName) }}
{{- if eq $least $most }} --workers {{ $most }}{{ else }} --workers {{ $least }}:{{ $most }}{{ end }} --gpus-per-worker 1
{{- printf " --preprocess-workers %v" $job.preprocessWorkers }}
{{- if not (kindIs "invalid" $job.evaluateWorkers) }}{{ printf " --evaluate-workers %v" $job.evaluateWorkers }}{{ end }}
{{- range $job.settings }} --set {{ . | squote }}{{ end }}
{{- end -}}
